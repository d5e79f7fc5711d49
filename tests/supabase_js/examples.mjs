// interview_sessions from supabase-js: what to call, what `data` is, and what `error` says.
//
// Every call answers { data, error, status }. It never throws (unless you ask for .throwOnError()): look at `error`
// first. It has a `code` to decide by and a `message` to read; `status` is the HTTP status.
//
//   status  code      when
//   400     22023     a value is out of its range: a score over 100, a negative number of questions
//   400     23514     the same of what the table checks: an empty session id
//   400     22P02     a value is of the wrong type: 15.5 minutes, a user id that is no UUID
//   401     42501     nobody is signed in
//   403     42501     an interview for somebody else, or something that is for backends only
//   404     PT404     no such interview session, or it is not yours (you cannot tell which)
//   404     PGRST202  a parameter is unknown, or one that is required is missing or undefined (which is not sent)
//   409     PT409     the session id belongs to another user
//   409     23503     there is no such user (only a backend can meet this)
//
// Run by tests/test_supabase_js.py with the real client against real Postgres and PostgREST.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { describe, test } from 'node:test';

import { backend, nobody, signIn, visitor } from './client.mjs';

const COLUMNS = [
  'id', 'user_id', 'email', 'session_id', 'resume_filename', 'job_description_filename', 'interview_status',
  'total_questions', 'questions_answered', 'duration_minutes', 'score', 'feedback', 'created_at', 'completed_at',
];

const VIEWS = [
  'interview_user_statistics', 'interview_completion_rate', 'interview_score_by_status', 'interview_daily_activity',
];

const FEEDBACK = {
  overall_score: 85.5,
  technical_skills: { score: 90, feedback: 'Strong technical knowledge' },
  communication: { score: 80, feedback: 'Clear explanations' },
  strengths: ['Technical expertise', 'Problem-solving'],
  improvements: ['Communication clarity'],
  recommendations: ['Practice explaining concepts'],
};

const NOT_FOUND = { status: 404, code: 'PT404', message: /^no such interview session$/ };

// ------------------------------------------------------------------------------------------------ the four examples

const callers = {
  'a signed-in user': signIn,
  'a backend with the service key': () => ({ supabase: backend(), user: signIn().user }),
};

for (const [caller, connect] of Object.entries(callers)) {
  describe(`an interview from start to end, by ${caller}`, () => {
    const { supabase, user } = connect();
    const sessionId = newSessionId();

    test('when the user starts the interview, create it: data is the session', async () => {
      const { data, error } = await supabase
        .rpc('create_interview_session', {
          p_user_id: user.id,
          p_email: user.email,
          p_session_id: sessionId,
          p_resume_filename: 'resume.pdf',
          p_job_description_filename: 'job_description.txt'
        });

      assert.equal(error, null);
      assertIsSession(data);
      assertHas(data, {
        user_id: user.id,
        email: user.email,
        session_id: sessionId,
        resume_filename: 'resume.pdf',
        job_description_filename: 'job_description.txt',
        interview_status: 'in_progress',
        total_questions: null,
        questions_answered: 0,
        duration_minutes: 0,
        score: null,
        feedback: null,
        completed_at: null,
      });
      assertIsRecent(data.created_at);
    });

    test('during the interview, report progress', async () => {
      const { data, error } = await supabase
        .rpc('update_interview_progress', {
          p_session_id: sessionId,
          p_questions_answered: 5,
          p_duration_minutes: 15
        });

      assert.equal(error, null);
      assertIsSession(data);
      assertHas(data, {
        session_id: sessionId,
        interview_status: 'in_progress',
        questions_answered: 5,
        duration_minutes: 15,
      });
    });

    test('when the interview finishes, complete it: the status and completed_at are set', async () => {
      const { data, error } = await supabase
        .rpc('complete_interview', {
          p_session_id: sessionId,
          p_score: 85.5,
          p_feedback: {
            overall_score: 85.5,
            technical_skills: {
              score: 90,
              feedback: "Strong technical knowledge"
            },
            communication: {
              score: 80,
              feedback: "Clear explanations"
            },
            strengths: ["Technical expertise", "Problem-solving"],
            improvements: ["Communication clarity"],
            recommendations: ["Practice explaining concepts"]
          }
        });

      assert.equal(error, null);
      assertIsSession(data);
      assertHas(data, { session_id: sessionId, interview_status: 'completed', score: 85.5 });
      assert.deepEqual(data.feedback, FEEDBACK);
      assertIsRecent(data.completed_at);
    });

    test("get all the user's interviews: data is an array, newest first", async () => {
      const newer = await start(supabase, user);

      const { data, error } = await supabase
        .rpc('get_user_interview_history', {
          p_user_id: user.id
        });

      assert.equal(error, null);
      assert.ok(Array.isArray(data));
      data.forEach(assertIsSession);
      assert.deepEqual(data.map((session) => session.session_id), [newer.session_id, sessionId]);
    });
  });
}

// ------------------------------------------------------------------------------------------------- calling again

test('creating the same session twice is harmless and answers the same session', async () => {
  const { supabase, user } = signIn();
  const first = await start(supabase, user);

  const second = await start(supabase, user, first.session_id);

  assert.deepEqual(second, first);
});

test('progress never goes back: the greatest numbers ever reported stand', async () => {
  const { supabase, user } = signIn();
  const { session_id } = await start(supabase, user);
  await done(progress(supabase, session_id, 5, 15));

  const late = await done(progress(supabase, session_id, 3, 20));

  assertHas(late, { questions_answered: 5, duration_minutes: 20 });
});

test('null and undefined leave a number of the progress as it is; without the session there is no such call', async () => {
  const { supabase, user } = signIn();
  const { session_id } = await start(supabase, user);
  await done(progress(supabase, session_id, 5, 15));

  assertHas(await done(progress(supabase, session_id, 6, null)), { questions_answered: 6, duration_minutes: 15 });
  assertHas(await done(progress(supabase, session_id, 7, undefined)), { questions_answered: 7, duration_minutes: 15 });
  await assertRefused(progress(supabase, undefined, 8, 16), {
    status: 404,
    code: 'PGRST202',
    message: /Could not find the function public\.update_interview_progress/,
  });
});

test('completing needs neither score nor feedback, and completing again replaces both', async () => {
  const { supabase, user } = signIn();
  const { session_id } = await start(supabase, user);

  const unscored = await done(supabase.rpc('complete_interview', { p_session_id: session_id }));
  assertHas(unscored, { interview_status: 'completed', score: null, feedback: null });

  const scored = await done(complete(supabase, session_id, 85.5, FEEDBACK));
  assertHas(scored, { interview_status: 'completed', score: 85.5, feedback: FEEDBACK });
  assert.ok(new Date(scored.completed_at) >= new Date(unscored.completed_at));
});

for (const [how, reason] of [['with a reason', { p_reason: 'the candidate is ill' }], ['without a reason', {}]]) {
  test(`cancelling ${how} answers the cancelled session; cancelling again is harmless`, async () => {
    const { supabase, user } = signIn();
    const { session_id } = await start(supabase, user);

    const cancelled = await done(supabase.rpc('cancel_interview', { p_session_id: session_id, ...reason }));

    assertIsSession(cancelled);
    assertHas(cancelled, { session_id, interview_status: 'cancelled', completed_at: null });
    assert.deepEqual(await done(cancel(supabase, session_id)), cancelled);
  });
}

test('a completed interview stays completed when it is cancelled: look at interview_status in the answer', async () => {
  const { supabase, user } = signIn();
  const { session_id } = await start(supabase, user);
  const completed = await done(complete(supabase, session_id, 85.5, FEEDBACK));

  assert.deepEqual(await done(cancel(supabase, session_id)), completed);
});

test('the history of a user without interviews is an empty array', async () => {
  const { supabase, user } = signIn();

  assert.deepEqual(await done(history(supabase, user)), []);
});

// --------------------------------------------------------------------------------------------------- wrong values

test('a session that does not exist is a 404 that says so', async () => {
  const { supabase } = signIn();
  const missing = newSessionId();

  await assertRefused(progress(supabase, missing, 5, 15), NOT_FOUND);
  await assertRefused(complete(supabase, missing, 85.5, FEEDBACK), NOT_FOUND);
  await assertRefused(cancel(supabase, missing), NOT_FOUND);
  await assertRefused(cancel(backend(), missing), NOT_FOUND);
});

test('with throwOnError the same error is thrown', async () => {
  const { supabase } = signIn();

  await assert.rejects(
    async () => await cancel(supabase, newSessionId()).throwOnError(),
    { code: NOT_FOUND.code, message: NOT_FOUND.message },
  );
});

test('wrong values are a 400 that names what is wrong, and change nothing', async () => {
  const { supabase, user } = signIn();
  const session = await start(supabase, user);
  const id = session.session_id;

  const negative = { status: 400, code: '22023', message: /progress cannot be negative/ };
  await assertRefused(progress(supabase, id, -1, 15), negative);
  await assertRefused(progress(supabase, id, 5, -1), negative);

  const score = { status: 400, code: '22023', message: /score must be from 0 to 100/ };
  await assertRefused(complete(supabase, id, 100.5, FEEDBACK), score);
  await assertRefused(complete(supabase, id, -1, FEEDBACK), score);

  const feedback = { status: 400, code: '22023', message: /feedback must be a JSON object/ };
  await assertRefused(complete(supabase, id, 85.5, 'well done'), feedback);
  await assertRefused(complete(supabase, id, 85.5, ['well', 'done']), feedback);

  await assertRefused(progress(supabase, id, 5, 15.5), { status: 400, code: '22P02', message: /integer: "15\.5"/ });
  await assertRefused(create(supabase, user, ''), { status: 400, code: '23514', message: /session_id_length/ });

  assert.deepEqual(await done(history(supabase, user)), [session]);
});

// ---------------------------------------------------------------------------------------- whose interview it is

test("another user's session is not there: the same 404, and it stays as it was", async () => {
  const owner = signIn();
  const other = signIn();
  const session = await start(owner.supabase, owner.user);

  await assertRefused(progress(other.supabase, session.session_id, 5, 15), NOT_FOUND);
  await assertRefused(complete(other.supabase, session.session_id, 100, FEEDBACK), NOT_FOUND);
  await assertRefused(cancel(other.supabase, session.session_id), NOT_FOUND);
  assert.deepEqual(await done(history(other.supabase, owner.user)), []);
  assert.deepEqual(await done(other.supabase.from('interview_sessions').select()), []);

  assert.deepEqual(await done(history(owner.supabase, owner.user)), [session]);
});

test("a session id that another user has is a conflict, for a user and for a backend that mixes users up", async () => {
  const owner = signIn();
  const other = signIn();
  const { session_id } = await start(owner.supabase, owner.user);
  const conflict = { status: 409, code: 'PT409', message: /^the session belongs to another user$/ };

  await assertRefused(create(other.supabase, other.user, session_id), conflict);
  await assertRefused(create(backend(), other.user, session_id), conflict);
});

test("creating an interview for another user's id is refused, by the RPC and in the table", async () => {
  const { supabase } = signIn();
  const other = signIn();
  const refused = { status: 403, code: '42501', message: /row-level security/ };

  await assertRefused(create(supabase, other.user, newSessionId()), refused);
  const row = { user_id: other.user.id, email: other.user.email, session_id: newSessionId() };
  await assertRefused(supabase.from('interview_sessions').insert(row), refused);
  assert.deepEqual(await done(history(other.supabase, other.user)), []);
});

test('a backend cannot create an interview for a user who does not exist', async () => {
  const unknown = { id: randomUUID(), email: 'nobody@example.com' };
  const refused = { status: 409, code: '23503', message: /user_id_fkey/ };

  await assertRefused(create(backend(), unknown, newSessionId()), refused);
});

for (const [who, connect] of [['has the anon key only', visitor], ['sends no key at all', nobody]]) {
  test(`somebody who ${who} can call nothing and see nothing`, async () => {
    const { supabase, user } = signIn();
    const session = await start(supabase, user);
    const anonymous = connect();
    const id = session.session_id;
    const permissionDenied = (what) => (
      { status: 401, code: '42501', message: new RegExp(`^permission denied for ${what}$`) }
    );

    await assertRefused(create(anonymous, user, id), permissionDenied('function create_interview_session'));
    await assertRefused(progress(anonymous, id, 5, 15), permissionDenied('function update_interview_progress'));
    await assertRefused(complete(anonymous, id, 85.5, FEEDBACK), permissionDenied('function complete_interview'));
    await assertRefused(cancel(anonymous, id), permissionDenied('function cancel_interview'));
    await assertRefused(history(anonymous, user), permissionDenied('function get_user_interview_history'));
    await assertRefused(anonymous.from('interview_sessions').select(), permissionDenied('table interview_sessions'));
    for (const view of VIEWS) {
      await assertRefused(anonymous.from(view).select(), permissionDenied(`view ${view}`));
    }

    assert.deepEqual(await done(history(supabase, user)), [session]);
  });
}

// ------------------------------------------------------------------------------------------------------ the views

test('the views show a user the figures of their own interviews', async () => {
  const { supabase, user } = signIn();
  await interviewWithScore(80, { minutes: 20, supabase, user });
  await interviewWithScore(91, { minutes: 25, supabase, user });
  await start(supabase, user);
  const stranger = signIn();
  await interviewWithScore(10, { minutes: 60, ...stranger });

  assert.deepEqual(await done(supabase.from('interview_user_statistics').select().single()), {
    user_id: user.id,
    total_interviews: 3,
    completed_interviews: 2,
    average_score: 85.5,
    total_time_minutes: 45,
  });
  assert.deepEqual(await done(supabase.from('interview_completion_rate').select().single()), {
    total_sessions: 3,
    completed_sessions: 2,
    completion_rate: 66.67, // per cent
  });
  assert.deepEqual(await done(supabase.from('interview_score_by_status').select()), [
    { interview_status: 'completed', session_count: 2, average_score: 85.5, min_score: 80, max_score: 91 },
  ]);
});

test('the views of a user without interviews: no row, or a row of zeros without a rate', async () => {
  const { supabase } = signIn();

  assert.equal(await done(supabase.from('interview_user_statistics').select().maybeSingle()), null);
  assert.deepEqual(await done(supabase.from('interview_completion_rate').select().single()), {
    total_sessions: 0,
    completed_sessions: 0,
    completion_rate: null,
  });
  assert.deepEqual(await done(supabase.from('interview_score_by_status').select()), []);
});

test('the service key sees the interviews and the figures of all users', async () => {
  const [one, other] = [signIn(), signIn()];
  await interviewWithScore(80, { minutes: 20, ...one });
  await interviewWithScore(90, { minutes: 30, ...other });
  const all = backend();
  const both = [one.user.id, other.user.id];

  assert.deepEqual((await done(history(all, one.user))).map((session) => session.score), [80]);
  assert.deepEqual(
    await done(all.from('interview_sessions').select('user_id, score').in('user_id', both).order('score')),
    [{ user_id: one.user.id, score: 80 }, { user_id: other.user.id, score: 90 }],
  );
  assert.deepEqual(
    await done(all.from('interview_user_statistics').select('user_id, total_time_minutes')
      .in('user_id', both).order('total_time_minutes')),
    [{ user_id: one.user.id, total_time_minutes: 20 }, { user_id: other.user.id, total_time_minutes: 30 }],
  );
  assert.ok((await done(all.from('interview_completion_rate').select().single())).completed_sessions >= 2);
  const scores = await done(
    all.from('interview_score_by_status').select().eq('interview_status', 'completed').single(),
  );
  assert.ok(scores.session_count >= 2 && scores.min_score <= 80 && scores.max_score >= 90);
});

// -------------------------------------------------------------------------------------- the calls, in one line each

function create(supabase, user, sessionId) {
  return supabase.rpc('create_interview_session', {
    p_user_id: user.id,
    p_email: user.email,
    p_session_id: sessionId,
    p_resume_filename: 'resume.pdf',
    p_job_description_filename: 'job_description.txt',
  });
}

function progress(supabase, sessionId, questions, minutes) {
  return supabase.rpc('update_interview_progress', {
    p_session_id: sessionId,
    p_questions_answered: questions,
    p_duration_minutes: minutes,
  });
}

function complete(supabase, sessionId, score, feedback) {
  return supabase.rpc('complete_interview', { p_session_id: sessionId, p_score: score, p_feedback: feedback });
}

function cancel(supabase, sessionId) {
  return supabase.rpc('cancel_interview', { p_session_id: sessionId });
}

function history(supabase, user) {
  return supabase.rpc('get_user_interview_history', { p_user_id: user.id });
}

// ------------------------------------------------------------------------------------------- what the tests need

function newSessionId() {
  return `session_api_${randomUUID()}`;
}

/** A session in progress. */
function start(supabase, user, sessionId = newSessionId()) {
  return done(create(supabase, user, sessionId));
}

async function interviewWithScore(score, { minutes, supabase, user }) {
  const { session_id } = await start(supabase, user);
  await done(progress(supabase, session_id, 5, minutes));
  await done(complete(supabase, session_id, score, FEEDBACK));
}

/** The data of a call that must work. */
async function done(call) {
  const { data, error } = await call;
  assert.equal(error, null);
  return data;
}

async function assertRefused(call, { status, code, message }) {
  const answer = await call;
  assert.equal(answer.data, null);
  assert.deepEqual({ status: answer.status, code: answer.error.code }, { status, code });
  assert.match(answer.error.message, message);
}

/** One object, not an array, with each of the 14 columns. */
function assertIsSession(data) {
  assert.deepEqual(Object.keys(data).sort(), COLUMNS.toSorted());
}

/** The session has these values, among others. */
function assertHas(session, values) {
  assert.deepEqual(Object.fromEntries(Object.keys(values).map((key) => [key, session[key]])), values);
}

/** A moment of the last minutes, with its offset, that Date can read. */
function assertIsRecent(timestamp) {
  assert.match(timestamp, /T.*(Z|[+-]\d\d:\d\d)$/);
  assert.ok(Math.abs(Date.now() - new Date(timestamp)) < 5 * 60_000);
}
