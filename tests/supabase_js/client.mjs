// Clients as a front end and a backend make them, on the embedded stack, which is PostgREST without Supabase's
// gateway. In your own code `...embeddedStackOnly` and `accessToken` go away; nothing else changes.

import { createClient } from '@supabase/supabase-js';

const { SUPABASE_URL, SUPABASE_ANON_KEY, SUPABASE_SECRET_KEY, TEST_USERS } = process.env;
const users = JSON.parse(TEST_USERS); // [{ id, email, jwt }, …], each used once

const embeddedStackOnly = {
  global: { fetch: fetchWithoutGateway },
  realtime: { transport: globalThis.WebSocket ?? class {} }, // Node 20 brings no WebSocket; nothing here opens one
};

/** A new user who has signed in, and the client that calls as them. */
export function signIn() {
  if (users.length === 0) throw new Error('no user left: let test_supabase_js.py create more');
  const { jwt, ...user } = users.pop();
  const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, {
    accessToken: async () => jwt, // with Supabase Auth, signing in does this
    ...embeddedStackOnly,
  });
  return { supabase, user };
}

/** The client of somebody who has not signed in: it has the anon (publishable) key only. */
export function visitor() {
  return createClient(SUPABASE_URL, SUPABASE_ANON_KEY, embeddedStackOnly);
}

/** The client of a request that carries no JWT at all, not even the anon key's. */
export function nobody() {
  const fetch = (url, { headers, ...options }) => {
    const fewer = new Headers(headers);
    fewer.delete('Authorization');
    return fetchWithoutGateway(url, { ...options, headers: fewer });
  };
  return createClient(SUPABASE_URL, SUPABASE_ANON_KEY, { ...embeddedStackOnly, global: { fetch } });
}

/** The client of a backend: the service (secret) key passes row level security and never belongs in a browser. */
export function backend() {
  return createClient(SUPABASE_URL, SUPABASE_SECRET_KEY, {
    auth: { persistSession: false, autoRefreshToken: false },
    ...embeddedStackOnly,
  });
}

/** fetch for a PostgREST that serves at /; Supabase's gateway serves it at /rest/v1. */
function fetchWithoutGateway(url, options) {
  return fetch(String(url).replace('/rest/v1/', '/'), options);
}
