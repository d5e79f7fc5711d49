-- The ledger of interview events, the dead letters, and the batch RPC that the workers call.
--
-- Run supabase_table_interview_sessions.sql first. Paste this in Supabase's SQL editor and run it; running it
-- again changes nothing. Postgres 15 or newer. Only service_role may touch what is made here.
--
--   interview_events                  what happened, each event once: makes a repeat harmless, can rebuild a row
--   interview_dead_letters            what could not be applied: the event, why, and what became of it
--   apply_interview_events            applies a pack of events in one transaction
--   record_dead_interview_events      keeps events that the worker itself found invalid
--   expire_waiting_interview_events   turns events whose session never started into dead letters

begin;

-- ---------------------------------------------------------------------------------------------------- the ledger

create table if not exists public.interview_events (
  event_id uuid not null,
  session_id text not null,
  type text not null,
  occurred_at timestamptz not null,
  payload jsonb not null,
  received_at timestamptz not null default now(),
  applied_at timestamptz,  -- null while the event waits for the start of its session
  constraint interview_events_pkey primary key (event_id),
  constraint interview_events_session_id_length check (char_length(session_id) between 1 and 200),
  constraint interview_events_type check (
    type in ('interview.started', 'interview.answered', 'interview.finished', 'interview.cancelled')),
  -- What stands here can be folded into a row, now or when its session starts: one bad event hurts no other.
  constraint interview_events_payload check (
    jsonb_typeof(payload) = 'object'
    and coalesce((payload ->> 'questions_answered')::integer >= 0, true)
    and coalesce((payload ->> 'duration_minutes')::integer >= 0, true)
    and coalesce((payload ->> 'total_questions')::integer >= 0, true)
    and coalesce((payload ->> 'score')::numeric between 0 and 100, true)
    and coalesce(jsonb_typeof(payload -> 'feedback') in ('object', 'null'), true)
    and (type <> 'interview.started'
         or (payload ->> 'user_id')::uuid is not null and payload ->> 'email' is not null))
);

comment on table public.interview_events is 'Each interview event once; applied_at is null while it waits.';

-- One session's story, in the order in which it happened.
create index if not exists interview_events_session_id_occurred_at_idx
  on public.interview_events (session_id, occurred_at);

-- The few that wait.
create index if not exists interview_events_waiting_idx
  on public.interview_events (session_id) where applied_at is null;

alter table public.interview_events enable row level security;
revoke all on public.interview_events from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.interview_events to service_role;

-- A session's ledger goes with it, so that deleting a user leaves nothing personal behind. Security definer, because
-- before Postgres 18 it runs as whoever deletes the user (supabase_auth_admin); nobody can call it otherwise.
create or replace function public.delete_interview_events_of_deleted_sessions()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
begin
  delete from public.interview_events e using deleted d where e.session_id = d.session_id;
  return null;
end;
$$;

create or replace trigger interview_sessions_delete_events
  after delete on public.interview_sessions
  referencing old table as deleted
  for each statement execute function public.delete_interview_events_of_deleted_sessions();

-- ---------------------------------------------------------------------------------------------- the dead letters

create table if not exists public.interview_dead_letters (
  id bigint generated always as identity,
  event text not null,  -- as it was received; 'base64:' and base64 where it is not text Postgres can hold
  event_id text,        -- these three where readable
  session_id text,
  type text,
  reason text not null,
  detail text not null,  -- never the candidate's data
  first_failed_at timestamptz not null default now(),
  last_failed_at timestamptz not null default now(),
  attempts integer not null default 1,
  status text not null default 'open',
  resolved_at timestamptz,
  replaced_by uuid,  -- the id of the event published in its stead
  note text,
  constraint interview_dead_letters_pkey primary key (id),
  constraint interview_dead_letters_reason check (
    reason in ('invalid_json', 'invalid_event', 'unsupported_type', 'too_large', 'unknown_user',
               'session_conflict', 'rejected', 'orphaned', 'poison')),
  -- open --replay--> replayed --applied--> resolved      open or replayed --discard--> discarded --restore--> open
  --                  replayed --fails again--> open
  constraint interview_dead_letters_status check (status in ('open', 'replayed', 'resolved', 'discarded'))
);

comment on table public.interview_dead_letters is 'Events that could not be applied, with the reason; replayable.';

-- One open row per event: failing again raises attempts.
create unique index if not exists interview_dead_letters_open_event_key
  on public.interview_dead_letters (md5(event)) where status in ('open', 'replayed');

-- Which open letters does this event, just applied, resolve?
create index if not exists interview_dead_letters_open_event_id_idx
  on public.interview_dead_letters (event_id) where status in ('open', 'replayed');

alter table public.interview_dead_letters enable row level security;
revoke all on public.interview_dead_letters from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.interview_dead_letters to service_role;

-- Keeps events that cannot be applied. p_letters: an array of {"event", "event_id"?, "session_id"?, "type"?,
-- "reason", "detail"}. Answers one {"id", "outcome", "reason", "detail"} per letter, in order; the outcome is
-- "duplicate" where the event turns out to be applied already (the worker that held it was slow, not dead).
create or replace function public.record_dead_interview_events(p_letters jsonb)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_result jsonb;
begin
  -- Somebody may be applying a poisoned event this very moment: wait for what becomes of it.
  perform public.lock_interview_sessions(array(
    select l.session_id from jsonb_to_recordset(p_letters) as l (session_id text, reason text)
     where l.reason = 'poison'));

  select coalesce(jsonb_agg(
           case when e.event_id is null
             then jsonb_build_object('id', l.event_id, 'outcome', 'rejected', 'reason', l.reason, 'detail', l.detail)
             else jsonb_build_object('id', l.event_id, 'outcome', 'duplicate', 'reason', null, 'detail', null)
           end order by l.n), '[]')
    into v_result
    from rows from (jsonb_to_recordset(p_letters) as (event_id text, reason text, detail text)) with ordinality
           as l (event_id, reason, detail, n)
    left join public.interview_events e
      on l.reason = 'poison' and e.event_id::text = l.event_id and e.applied_at is not null;

  insert into public.interview_dead_letters as d (event, event_id, session_id, type, reason, detail, attempts)
  select l.event, min(l.event_id), min(l.session_id), min(l.type), min(l.reason), min(coalesce(l.detail, '')),
         count(*)
    from rows from (jsonb_to_recordset(p_letters)
           as (event text, event_id text, session_id text, type text, reason text, detail text)) with ordinality
           as l (event, event_id, session_id, type, reason, detail, n)
   where v_result -> (l.n::integer - 1) ->> 'outcome' = 'rejected'
   group by l.event
   order by l.event  -- a fixed order: two packs never wait for each other in a circle
  on conflict (md5(event)) where status in ('open', 'replayed')
  do update set attempts = d.attempts + excluded.attempts,
                last_failed_at = excluded.last_failed_at,
                status = 'open',
                reason = excluded.reason,
                detail = excluded.detail;
  return v_result;
end;
$$;

-- --------------------------------------------------------------------------------------------------- applying

-- Waits until nobody else works on these sessions, in a fixed order so that packs never deadlock. Without it, an
-- answer and the start of its session in two transactions do not see each other, and the answer waits for ever.
create or replace function public.lock_interview_sessions(p_session_ids text[])
returns void
language plpgsql
security invoker
set search_path = ''
as $$
begin
  perform pg_advisory_xact_lock(k.key)
     from (select distinct hashtextextended(s.session_id, 0) as key
             from unnest(p_session_ids) as s (session_id)
            order by 1) k;
end;
$$;

-- Folds events that stand in the ledger into the rows of their sessions, each rule by the RPC that owns it.
-- The sessions are locked, and those without a row have a start among the events.
create or replace function public.fold_interview_events(p_event_ids uuid[])
returns void
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v record;
  v_started record;
  v_payload jsonb;
  v_occurred_at timestamptz;
begin
  for v in
    select e.session_id,
           bool_or(e.type = 'interview.started') as started,
           bool_or(e.type = 'interview.finished') as finished,
           bool_or(e.type = 'interview.cancelled') as cancelled,
           max((e.payload ->> 'questions_answered')::integer) as questions_answered,
           max((e.payload ->> 'duration_minutes')::integer) as duration_minutes,
           max((e.payload ->> 'total_questions')::integer) as total_questions
      from public.interview_events e
     where e.event_id = any (p_event_ids)
       and e.applied_at is not null  -- the others wait
     group by e.session_id
     order by e.session_id
  loop
    if v.started then
      -- The earliest start gives the names (ties: the smaller id); the ledger knows those applied before.
      select (array_agg(e.payload order by e.occurred_at, e.event_id))[1] as payload,
             min(e.occurred_at) as occurred_at,
             count(distinct (e.payload ->> 'user_id')::uuid) as users
        into v_started
        from public.interview_events e
       where e.session_id = v.session_id
         and e.type = 'interview.started';
      if v_started.users > 1 then
        raise exception using errcode = 'PT409', message = 'the session belongs to another user';
      end if;
      perform public.create_interview_session(
        p_user_id => (v_started.payload ->> 'user_id')::uuid,
        p_email => v_started.payload ->> 'email',
        p_session_id => v.session_id,
        p_resume_filename => v_started.payload ->> 'resume_filename',
        p_job_description_filename => v_started.payload ->> 'job_description_filename',
        p_created_at => v_started.occurred_at);
    end if;

    if coalesce(v.questions_answered, v.duration_minutes, v.total_questions) is not null then
      perform public.update_interview_progress(
        v.session_id, v.questions_answered, v.duration_minutes, v.total_questions);
    end if;

    if v.finished then
      -- The latest finish gives the score (ties: the greater id).
      select e.payload, e.occurred_at
        into v_payload, v_occurred_at
        from public.interview_events e
       where e.session_id = v.session_id
         and e.type = 'interview.finished'
       order by e.occurred_at desc, e.event_id desc
       limit 1;
      perform public.complete_interview(
        v.session_id, (v_payload ->> 'score')::numeric, nullif(v_payload -> 'feedback', 'null'), v_occurred_at);
    end if;

    if v.cancelled then
      perform public.cancel_interview(v.session_id);  -- the reason stays in the ledger
    end if;
  end loop;
end;
$$;

-- Resolves the open letters of those of these events that are applied.
create or replace function public.resolve_dead_interview_events(p_event_ids uuid[])
returns void
language sql
security invoker
set search_path = ''
as $$
  update public.interview_dead_letters d
     set status = 'resolved', resolved_at = now()
    from public.interview_events e
   where e.event_id = any (p_event_ids)
     and e.applied_at is not null
     and d.event_id = e.event_id::text
     and d.session_id = e.session_id  -- a letter may hold another event that was given the same id
     and d.type = e.type
     and d.status in ('open', 'replayed');
$$;

-- Applies a whole pack or raises. The sessions are locked. Answers as apply_interview_events does.
create or replace function public.apply_interview_event_pack(p_events jsonb)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_live text[];      -- sessions that have a row, or a start in this pack
  v_new uuid[];       -- events the ledger did not know
  v_released uuid[];  -- events that waited for a session that is live now
begin
  -- Locked, so that nobody deletes a session (or its user) between this look and our commit.
  v_live := array(
    select s.session_id
      from public.interview_sessions s
     where s.session_id in (select i.subject from jsonb_to_recordset(p_events) as i (subject text))
     order by s.session_id
       for no key update)
    || array(
    select distinct i.subject
      from jsonb_to_recordset(p_events) as i (type text, subject text)
     where i.type = 'interview.started');

  with inserted as (
    insert into public.interview_events (event_id, session_id, type, occurred_at, payload, applied_at)
    select i.id, i.subject, i.type, i.time, i.data, case when l.session_id is not null then now() end
      from jsonb_to_recordset(p_events) as i (id uuid, type text, subject text, time timestamptz, data jsonb)
      left join (select distinct unnest(v_live) as session_id) l on l.session_id = i.subject
    on conflict (event_id) do nothing
    returning event_id
  )
  select array_agg(event_id) into v_new from inserted;

  if exists (
    select
      from jsonb_to_recordset(p_events) as i (id uuid, type text, subject text, time timestamptz)
      join public.interview_events e on e.event_id = i.id
     where (e.session_id, e.type, e.occurred_at) is distinct from (i.subject, i.type, i.time)
  ) then
    raise exception using errcode = 'PT422', message = 'another event with this id is in the ledger';
  end if;

  with released as (
    update public.interview_events e
       set applied_at = now()
      from unnest(v_live) as l (session_id)
     where e.session_id = l.session_id
       and e.applied_at is null
    returning e.event_id
  )
  select array_agg(event_id) into v_released from released;

  perform public.fold_interview_events(v_new || v_released);
  perform public.resolve_dead_interview_events(
    v_released || array(select i.id from jsonb_to_recordset(p_events) as i (id uuid)));

  return (
    select jsonb_agg(
             jsonb_build_object(
               'id', i.id,
               'outcome', case when n.event_id is null or i.repeat > 1 then 'duplicate'
                               when l.session_id is null then 'waiting'
                               else 'applied' end,
               'reason', null,
               'detail', null)
             order by i.n)
      from (select r.*, row_number() over (partition by r.id order by r.n) as repeat
              from rows from (jsonb_to_recordset(p_events) as (id uuid, subject text)) with ordinality
                     as r (id, subject, n)) i
      left join unnest(v_new) as n (event_id) on n.event_id = i.id
      left join (select distinct unnest(v_live) as session_id) l on l.session_id = i.subject);
end;
$$;

-- Applies events, a JSON array in CloudEvents' structured mode, in one transaction. Answers one {"id", "outcome",
-- "reason", "detail"} per event, in order; outcome is "applied", "duplicate" (the ledger has it), "waiting" (its
-- session has not started) or "rejected", which is in interview_dead_letters when this returns.
create or replace function public.apply_interview_events(p_events jsonb)
returns jsonb
language plpgsql
security invoker
set search_path = ''
set lock_timeout = '5s'  -- somebody holds the table: an outage (55P03), not these events' fault
as $$
declare
  v_count integer := jsonb_array_length(p_events);
  v_state text;
  v_constraint text;
  v_column text;
  v_message text;
begin
  if v_count = 0 then
    return '[]';
  end if;

  -- Before the block below, so that a failed attempt does not give the locks back.
  perform public.lock_interview_sessions(array(select e ->> 'subject' from jsonb_array_elements(p_events) as e));

  begin
    return public.apply_interview_event_pack(p_events);
  exception
    when data_exception or integrity_constraint_violation or program_limit_exceeded
      or sqlstate 'PT409' or sqlstate 'PT422' then
      get stacked diagnostics
        v_state = returned_sqlstate, v_constraint = constraint_name, v_column = column_name,
        v_message = message_text;
  end;

  if v_count > 1 then  -- somebody in here is guilty: halve until it stands alone
    return public.apply_interview_events(jsonb_path_query_array(
             p_events, '$[0 to $last]', jsonb_build_object('last', v_count / 2 - 1)))
        || public.apply_interview_events(jsonb_path_query_array(
             p_events, '$[$first to last]', jsonb_build_object('first', v_count / 2)));
  end if;

  return public.record_dead_interview_events(jsonb_build_array(jsonb_build_object(
    'event', (p_events -> 0)::text,
    'event_id', lower(p_events -> 0 ->> 'id'),
    'session_id', p_events -> 0 ->> 'subject',
    'type', p_events -> 0 ->> 'type',
    'reason', case when v_constraint = 'interview_sessions_user_id_fkey' then 'unknown_user'
                   when v_state = 'PT409' then 'session_conflict'
                   else 'rejected' end,
    -- Postgres' own messages quote values, ours do not.
    'detail', case when v_constraint = 'interview_sessions_user_id_fkey' then 'no such user in auth.users'
                   when v_state like 'PT%' then v_message
                   else concat_ws(', ', 'SQLSTATE ' || v_state, 'constraint ' || nullif(v_constraint, ''),
                                  'column ' || nullif(v_column, '')) end)));
end;
$$;

-- Turns events that have waited for their session too long into dead letters, reason "orphaned"; those whose
-- session has a row by now (a person created it) are applied instead. Answers how many became dead letters.
create or replace function public.expire_waiting_interview_events(p_older_than interval)
returns integer
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_sessions text[] := array(
    select e.session_id
      from public.interview_events e
      left join public.interview_sessions s on s.session_id = e.session_id
     where e.applied_at is null
       and e.received_at < now() - p_older_than
     group by e.session_id, s.session_id
     order by s.session_id is not null, e.session_id  -- orphans first
     limit 1000);  -- a bounded batch: call again while it answers more than 0
  v_live text[];
  v_applied uuid[];
  v_letters jsonb;
begin
  perform public.lock_interview_sessions(v_sessions);

  v_live := array(
    select s.session_id
      from public.interview_sessions s
     where s.session_id = any (v_sessions)
     order by s.session_id
       for no key update);
  with released as (
    update public.interview_events e
       set applied_at = now()
     where e.session_id = any (v_live)
       and e.applied_at is null
    returning e.event_id
  )
  select array_agg(event_id) into v_applied from released;
  perform public.fold_interview_events(v_applied);
  perform public.resolve_dead_interview_events(v_applied);

  with expired as (
    delete from public.interview_events e
     where e.session_id = any (v_sessions)
       and e.applied_at is null
       and e.received_at < now() - p_older_than
    returning e.*
  )
  select jsonb_agg(jsonb_build_object(
           'event', jsonb_build_object(
             'specversion', '1.0', 'id', x.event_id, 'source', '/interview_events', 'type', x.type,
             'subject', x.session_id, 'data', x.payload,
             'time', to_char(x.occurred_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'))::text,
           'event_id', x.event_id,
           'session_id', x.session_id,
           'type', x.type,
           'reason', 'orphaned',
           'detail', 'its session did not start within ' || p_older_than))
    into v_letters
    from expired x;

  return jsonb_array_length(public.record_dead_interview_events(coalesce(v_letters, '[]')));
end;
$$;

revoke all on function
  public.delete_interview_events_of_deleted_sessions(),
  public.record_dead_interview_events(jsonb),
  public.lock_interview_sessions(text[]),
  public.fold_interview_events(uuid[]),
  public.resolve_dead_interview_events(uuid[]),
  public.apply_interview_event_pack(jsonb),
  public.apply_interview_events(jsonb),
  public.expire_waiting_interview_events(interval)
from public, anon, authenticated, service_role;
grant execute on function
  public.record_dead_interview_events(jsonb),
  public.lock_interview_sessions(text[]),
  public.fold_interview_events(uuid[]),
  public.resolve_dead_interview_events(uuid[]),
  public.apply_interview_event_pack(jsonb),
  public.apply_interview_events(jsonb),
  public.expire_waiting_interview_events(interval)
to service_role;

commit;

notify pgrst, 'reload schema';
