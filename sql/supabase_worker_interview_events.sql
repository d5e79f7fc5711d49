-- The ledger of interview events, the dead letters, and the batch RPC that the workers call.
--
-- Run supabase_table_interview_sessions.sql first. Paste this in Supabase's SQL editor and run it; running it
-- again changes nothing. Postgres 15 or newer. Only service_role may touch what is made here.
--
--   interview_events                  what happened, each event once: makes a repeat harmless, can rebuild a row
--   interview_dead_letters            what could not be applied: the event, why, and what became of it
--   interview_dead_letter_actions     what operators did with dead letters
--   apply_interview_events            applies a pack of events in one transaction
--   apply_interview_events_summary    the same, with a short answer: what the workers call
--   record_dead_interview_events      keeps events that the worker itself found invalid
--   expire_waiting_interview_events   turns events whose session never started into dead letters
--   purge_interview_events            removes the ledger of sessions that ended long ago
--   get_interview_timeline            one session's story
--   verify_interview_sessions         compares rows with their ledger, a page at a time
--   rebuild_interview_session         restores one row from its ledger
--   find_, choose_, group_, count_interview_dead_letters    which dead letters there are
--   move_interview_dead_letters                             replays, discards and restores them
--   replace_interview_dead_letter                           applies a corrected event in the stead of one

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

-- Where do the old ones lie? Tiny, because rows come in the order of this column.
create index if not exists interview_events_received_at_idx
  on public.interview_events using brin (received_at) with (autosummarize = on);

alter table public.interview_events enable row level security;
revoke all on public.interview_events from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.interview_events to service_role;
-- No grant lets anyone else in; this says so where grants are looked at last, and holds should one slip in.
drop policy if exists "Only service_role" on public.interview_events;
create policy "Only service_role" on public.interview_events
  as restrictive for all to anon, authenticated using (false);

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

-- A letter's group: its reason, type and detail, without the ids and numbers that differ from letter to letter; an
-- SQLSTATE is no such number.
create or replace function public.group_of_interview_dead_letter(p_reason text, p_type text, p_detail text)
returns text
language sql
immutable
security invoker
set search_path = ''
as $$
  select left(md5(concat_ws('|', p_reason, p_type, regexp_replace(
           p_detail, '(SQLSTATE \w+)|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+', '\1#', 'gi'))), 8);
$$;

-- Stored, because to work it out takes 15 us: 100,000 letters would be grouped in seconds.
alter table public.interview_dead_letters
  add column if not exists group_id text
  generated always as (public.group_of_interview_dead_letter(reason, type, detail)) stored;

-- One open row per event: failing again raises attempts.
create unique index if not exists interview_dead_letters_open_event_key
  on public.interview_dead_letters (md5(event)) where status in ('open', 'replayed');

-- Which open letters does this event, just applied, resolve?
create index if not exists interview_dead_letters_open_event_id_idx
  on public.interview_dead_letters (event_id) where status in ('open', 'replayed');

alter table public.interview_dead_letters enable row level security;
revoke all on public.interview_dead_letters from public, anon, authenticated, service_role;
revoke all on sequence public.interview_dead_letters_id_seq from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.interview_dead_letters to service_role;
-- No grant lets anyone else in; this says so where grants are looked at last, and holds should one slip in.
drop policy if exists "Only service_role" on public.interview_dead_letters;
create policy "Only service_role" on public.interview_dead_letters
  as restrictive for all to anon, authenticated using (false);

-- An event's text for its dead letter: as it was received, where it is the replay of a letter, else as we have it.
create or replace function public.received_interview_event(p_event jsonb)
returns text
language sql
stable
security invoker
set search_path = ''
as $$
  select coalesce(
    (select d.event
       from public.interview_dead_letters d
      where d.event_id = lower(p_event ->> 'id')
        and d.session_id = p_event ->> 'subject'
        and d.type = p_event ->> 'type'
        and d.status = 'replayed'
      order by d.id
      limit 1),
    p_event::text);
$$;

-- Keeps events that cannot be applied. p_letters: an array of {"event", "event_id"?, "session_id"?, "type"?,
-- "reason", "detail"}. Answers one {"id", "outcome", "reason", "detail", "again"} per letter, in order; the outcome is
-- "duplicate" where the event turns out to be applied already (the worker that held it was slow, not dead); "again"
-- says that the event was an open dead letter before.
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
             then jsonb_build_object('id', l.event_id, 'outcome', 'rejected', 'reason', l.reason, 'detail', l.detail,
                                     'again', d.id is not null)
             else jsonb_build_object('id', l.event_id, 'outcome', 'duplicate', 'reason', null, 'detail', null)
           end order by l.n), '[]')
    into v_result
    from rows from (jsonb_to_recordset(p_letters)
           as (event text, event_id text, reason text, detail text)) with ordinality
           as l (event, event_id, reason, detail, n)
    left join public.interview_dead_letters d on md5(d.event) = md5(l.event) and d.status in ('open', 'replayed')
    left join public.interview_events e
      on e.event_id = case when l.reason = 'poison' and l.event_id ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                           then l.event_id::uuid end
     and e.applied_at is not null;

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

-- Of an earlier version: its rules stand in apply_interview_event_pack now.
drop function if exists public.fold_interview_events(uuid[]);

-- Resolves the open letters of those of these events that are applied.
create or replace function public.resolve_dead_interview_events(p_event_ids uuid[])
returns void
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_letters bigint[];
begin
  -- Mostly none is open, and this one look spares a look for each event.
  if not exists (select from public.interview_dead_letters d where d.status in ('open', 'replayed')) then
    return;
  end if;

  v_letters := array(
    select d.id
      from unnest(p_event_ids) as i (id)
     cross join lateral (
       select d.id, d.session_id, d.type
         from public.interview_dead_letters d
        where d.event_id = i.id::text
          and d.detail <> 'another event with this id is in the ledger'
          and d.status in ('open', 'replayed')
       offset 0) d
     cross join lateral (
       select
         from public.interview_events e
        where e.event_id = i.id
          and e.applied_at is not null
          and e.session_id = d.session_id  -- a letter may hold another event that was given the same id
          and e.type = d.type
       limit 1) e);
  if cardinality(v_letters) > 0 then
    update public.interview_dead_letters d
       set status = 'resolved', resolved_at = now()
     where d.id = any (v_letters)
       and d.status in ('open', 'replayed');
  end if;
end;
$$;

-- Applies a whole pack or raises. The sessions are locked. Answers what was not applied: one {"n", "id", "outcome",
-- "reason", "detail"} for each such event, in order, n being its place in the pack, from 1.
--
-- One statement reads the pack once, and folds what it has just written by the rules of the four RPCs (a test holds both
-- to the same). "lateral" with "offset 0" or "limit" keeps it to one look by index for each event or session: a plan
-- that was made while the tables were small would else come to read them whole.
create or replace function public.apply_interview_event_pack(p_events jsonb)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_ids uuid[];
  v_released uuid[];  -- events that waited for a session that is live now
  v_others jsonb;
  v_repeats boolean;
  v_sessions integer;
  v_folded integer;
begin
  with pack as materialized (
    select i.*, row_number() over (partition by i.id order by i.n) > 1 as repeats
      from rows from (jsonb_to_recordset(p_events)
             as (id uuid, type text, subject text, "time" timestamptz, data jsonb)) with ordinality
             as i (id, type, session_id, occurred_at, payload, n)
  ),
  -- Sessions that have a row, or a start in this pack. Locked, so that nobody deletes one (or its user) before our commit.
  live as materialized (
    select p.session_id, s.session_id is not null as there, s.user_id, s.email, s.resume_filename,
           s.job_description_filename, s.created_at
      from (select p.session_id, bool_or(p.type = 'interview.started') as starts
              from pack p
             group by p.session_id
             order by p.session_id) p
      left join lateral (
        select s.*
          from public.interview_sessions s
         where s.session_id = p.session_id
           for no key update) s on true
     where p.starts or s.session_id is not null
  ),
  known as materialized (
    select p.*, p.repeats or e.there as duplicate, l.session_id is not null as is_live
      from pack p
      left join live l on l.session_id = p.session_id
     cross join lateral (
       select exists (select from public.interview_events e where e.event_id = p.id) as there
       offset 0) e
  ),
  inserted as (
    insert into public.interview_events (event_id, session_id, type, occurred_at, payload, applied_at)
    select k.id, k.session_id, k.type, k.occurred_at, k.payload, case when k.is_live then now() end
      from known k
     where not k.duplicate
    returning event_id, session_id, type, occurred_at, payload, applied_at
  ),
  waiting as materialized (
    select w.*
      from live l
     cross join lateral (
       select e.event_id, e.session_id, e.type, e.occurred_at, e.payload
         from public.interview_events e
        where e.session_id = l.session_id
          and e.applied_at is null
       offset 0) w
  ),
  fresh as materialized (
    select i.event_id, i.session_id, i.type, i.occurred_at, i.payload from inserted i where i.applied_at is not null
    union all
    select * from waiting
  ),
  told as materialized (
    select f.session_id,
           array_agg((f.payload ->> 'user_id')::uuid) filter (where f.type = 'interview.started') as users,
           bool_or(f.type = 'interview.finished') as finished,
           bool_or(f.type = 'interview.cancelled') as cancelled,
           max((f.payload ->> 'questions_answered')::integer) as questions_answered,
           max((f.payload ->> 'duration_minutes')::integer) as duration_minutes,
           max((f.payload ->> 'total_questions')::integer) as total_questions
      from fresh f
     group by f.session_id
  ),
  -- The earliest start gives the names (ties: the smaller id).
  started as (
    select distinct on (c.session_id) c.session_id, c.payload, c.occurred_at
      from (select f.session_id, f.payload, f.occurred_at, f.event_id from fresh f where f.type = 'interview.started'
            union all
            select t.session_id, e.payload, e.occurred_at, e.event_id
              from told t
              join live l on l.session_id = t.session_id and l.there
             cross join lateral (
               select e.payload, e.occurred_at, e.event_id
                 from public.interview_events e
                where e.session_id = t.session_id
                  and e.type = 'interview.started'
                order by e.occurred_at, e.event_id
                limit 1) e
             where t.users is not null) c
     order by c.session_id, c.occurred_at, c.event_id
  ),
  -- The latest finish gives the score (ties: the greater id).
  finished as (
    select distinct on (c.session_id) c.session_id, c.payload, c.occurred_at
      from (select f.session_id, f.payload, f.occurred_at, f.event_id from fresh f where f.type = 'interview.finished'
            union all
            select t.session_id, e.payload, e.occurred_at, e.event_id
              from told t
              join live l on l.session_id = t.session_id and l.there
             cross join lateral (
               select e.payload, e.occurred_at, e.event_id
                 from public.interview_events e
                where e.session_id = t.session_id
                  and e.type = 'interview.finished'
                order by e.occurred_at desc, e.event_id desc
                limit 1) e
             where t.finished) c
     order by c.session_id, c.occurred_at desc, c.event_id desc
  ),
  folded as (
    insert into public.interview_sessions as s
      (session_id, user_id, email, resume_filename, job_description_filename, created_at, questions_answered,
       duration_minutes, total_questions, interview_status, score, feedback, completed_at)
    select t.session_id,
           case when t.users is null then l.user_id else (n.payload ->> 'user_id')::uuid end,
           case when t.users is null then l.email else n.payload ->> 'email' end,
           case when t.users is null then l.resume_filename else n.payload ->> 'resume_filename' end,
           case when t.users is null then l.job_description_filename else n.payload ->> 'job_description_filename' end,
           case when t.users is null then l.created_at else n.occurred_at end,
           coalesce(t.questions_answered, 0), coalesce(t.duration_minutes, 0), t.total_questions,
           case when t.finished then 'completed' when t.cancelled then 'cancelled' else 'in_progress' end,
           (f.payload ->> 'score')::numeric, nullif(f.payload -> 'feedback', 'null'), f.occurred_at
      from told t
      join live l on l.session_id = t.session_id
      left join started n on n.session_id = t.session_id
      left join finished f on f.session_id = t.session_id
     where t.users is null or (n.payload ->> 'user_id')::uuid = all (t.users)
     order by t.session_id
    on conflict (session_id) do update
      set email = case when excluded.created_at <= s.created_at then excluded.email else s.email end,
          resume_filename = case when excluded.created_at <= s.created_at
                              then excluded.resume_filename else s.resume_filename end,
          job_description_filename = case when excluded.created_at <= s.created_at
                                       then excluded.job_description_filename else s.job_description_filename end,
          created_at = least(s.created_at, excluded.created_at),
          questions_answered = greatest(s.questions_answered, excluded.questions_answered),
          duration_minutes = greatest(s.duration_minutes, excluded.duration_minutes),
          total_questions = greatest(s.total_questions, excluded.total_questions),
          interview_status = case when 'completed' in (s.interview_status, excluded.interview_status) then 'completed'
                                  when 'cancelled' in (s.interview_status, excluded.interview_status) then 'cancelled'
                                  else s.interview_status end,
          score = case when excluded.completed_at >= coalesce(s.completed_at, '-infinity')
                    then excluded.score else s.score end,
          feedback = case when excluded.completed_at >= coalesce(s.completed_at, '-infinity')
                       then excluded.feedback else s.feedback end,
          completed_at = greatest(s.completed_at, excluded.completed_at)
      where s.user_id = excluded.user_id
    returning s.session_id
  )
  select array_agg(k.id), bool_or(k.duplicate), (select array_agg(w.event_id) from waiting w),
         jsonb_agg(
           jsonb_build_object('n', k.n, 'id', k.id, 'outcome', case when k.duplicate then 'duplicate' else 'waiting' end,
                              'reason', null, 'detail', null)
           order by k.n) filter (where k.duplicate or not k.is_live),
         (select count(*) from told), (select count(*) from folded)
    into v_ids, v_repeats, v_released, v_others, v_sessions, v_folded
    from known k;

  if v_repeats and exists (
    select
      from jsonb_to_recordset(p_events) as i (id uuid, type text, subject text, time timestamptz)
     cross join lateral (
       select e.session_id, e.type, e.occurred_at
         from public.interview_events e
        where e.event_id = i.id
       offset 0) e
     where (e.session_id, e.type, e.occurred_at) is distinct from (i.subject, i.type, i.time)
  ) then
    raise exception using errcode = 'PT422', message = 'another event with this id is in the ledger';
  end if;
  if v_folded < v_sessions then
    raise exception using errcode = 'PT409', message = 'the session belongs to another user';
  end if;
  if v_released is not null then
    update public.interview_events e
       set applied_at = now()
     where e.event_id = any (v_released);
  end if;
  perform public.resolve_dead_interview_events(v_released || v_ids);
  return coalesce(v_others, '[]');
end;
$$;

-- Applies what can be applied, and makes dead letters of the rest: halves a pack on bad data until the guilty event
-- stands alone. Answers as apply_interview_event_pack does; p_before is how many events of the pack stand before these.
create or replace function public.apply_or_halve_interview_events(p_events jsonb, p_before integer)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_count integer := jsonb_array_length(p_events);
  v_others jsonb;
  v_state text;
  v_constraint text;
  v_column text;
  v_message text;
begin
  -- Before the block below, so that a failed attempt does not give the locks back.
  perform public.lock_interview_sessions(array(select e ->> 'subject' from jsonb_array_elements(p_events) as e));

  for v_attempt in 1..2 loop
    begin
      v_others := public.apply_interview_event_pack(p_events);
      if p_before > 0 and v_others <> '[]' then
        v_others := (
          select jsonb_agg(o || jsonb_build_object('n', (o ->> 'n')::integer + p_before))
            from jsonb_array_elements(v_others) as o);
      end if;
      return v_others;
    exception
      when data_exception or integrity_constraint_violation or program_limit_exceeded
        or sqlstate 'PT409' or sqlstate 'PT422' then
        get stacked diagnostics
          v_state = returned_sqlstate, v_constraint = constraint_name, v_column = column_name,
          v_message = message_text;
    end;
    -- Another session's pack brought the same id at the same moment: look again, the ledger has it now.
    exit when v_constraint is distinct from 'interview_events_pkey';
  end loop;

  if v_count > 1 then  -- somebody in here is guilty: halve until it stands alone
    return public.apply_or_halve_interview_events(
             jsonb_path_query_array(
               p_events, '$[0 to $last]', jsonb_build_object('last', v_count / 2 - 1)),
             p_before)
        || public.apply_or_halve_interview_events(
             jsonb_path_query_array(p_events, '$[$first to last]', jsonb_build_object('first', v_count / 2)),
             p_before + v_count / 2);
  end if;

  v_others := public.record_dead_interview_events(jsonb_build_array(jsonb_build_object(
    'event', public.received_interview_event(p_events -> 0),
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
  return jsonb_build_array(v_others -> 0 || jsonb_build_object('n', p_before + 1));
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
-- Plans are kept: to plan anew took half the time of a pack of one event. And they go by index, also where they were made
-- while the tables were small.
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_others jsonb;
begin
  if jsonb_array_length(p_events) = 0 then
    return '[]';
  end if;

  v_others := public.apply_or_halve_interview_events(p_events, 0);
  return (
    select jsonb_agg(
             coalesce(
               o.answer - 'n',
               jsonb_build_object('id', (e.event ->> 'id')::uuid, 'outcome', 'applied', 'reason', null, 'detail', null))
             order by e.n)
      from jsonb_array_elements(p_events) with ordinality as e (event, n)
      left join (select x as answer, (x ->> 'n')::bigint as n from jsonb_array_elements(v_others) as x) o on o.n = e.n);
end;
$$;

-- What the workers call: applies events as apply_interview_events does, and answers in short: {"received", "applied",
-- "others"}, how many events came and how many were applied, and for each of the others what became of it, in order.
create or replace function public.apply_interview_events_summary(p_events jsonb)
returns jsonb
language plpgsql
security invoker
set search_path = ''
set lock_timeout = '5s'  -- these three as for apply_interview_events
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_count integer := jsonb_array_length(p_events);
  v_others jsonb := '[]';
begin
  if v_count > 0 then
    v_others := public.apply_or_halve_interview_events(p_events, 0);
  end if;
  return jsonb_build_object(
    'received', v_count,
    'applied', v_count - jsonb_array_length(v_others),
    'others', case when v_others = '[]' then v_others
                   else (select jsonb_agg(o.answer - 'n' order by o.n)
                           from jsonb_array_elements(v_others) with ordinality as o (answer, n)) end);
end;
$$;

-- For 'interviews doctor': which text of both files was run. A test says what stands here.
comment on function public.apply_interview_events(jsonb) is 'Applies a pack of events. Version cf111647.';

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
  v_letters jsonb;
begin
  perform public.lock_interview_sessions(v_sessions);

  v_live := array(
    select s.session_id
      from public.interview_sessions s
     where s.session_id = any (v_sessions)
     order by s.session_id
       for no key update);
  -- One event of each session is enough: what else waits for it is applied with it.
  perform public.apply_interview_event_pack((
    select coalesce(jsonb_agg(jsonb_build_object(
             'id', w.event_id, 'type', w.type, 'subject', w.session_id, 'time', w.occurred_at, 'data', w.payload)), '[]')
      from (select distinct on (e.session_id) e.*
              from public.interview_events e
             where e.session_id = any (v_live)
               and e.applied_at is null
             order by e.session_id) w));

  with expired as (
    delete from public.interview_events e
     where e.session_id = any (v_sessions)
       and e.applied_at is null
       and e.received_at < now() - p_older_than
    returning e.*
  )
  select jsonb_agg(jsonb_build_object(
           'event', public.received_interview_event(jsonb_build_object(
             'specversion', '1.0', 'id', x.event_id, 'source', '/interview_events', 'type', x.type,
             'subject', x.session_id, 'data', x.payload,
             'time', to_char(x.occurred_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'))),
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

-- Removes the ledger of sessions that ended and have been quiet for long; never an event that waits, never a dead
-- letter. Answers how many events it removed; a bounded batch: call again while it answers more than 0. What is
-- removed can no longer be verified or rebuilt; should its events come again, the row stays as it is (but for starts or
-- finishes of the same time: which of them had the smaller or greater id is then forgotten).
create or replace function public.purge_interview_events(p_older_than interval)
returns integer
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_before constant timestamptz := now() - p_older_than;
  v_sessions text[] := array(
    select distinct quiet.session_id
      from (
        select e.session_id
          from public.interview_events e
          join public.interview_sessions s on s.session_id = e.session_id
         where e.received_at < v_before
           and s.interview_status <> 'in_progress'
           and not exists (
                 select
                   from public.interview_events late
                  where late.session_id = e.session_id
                    and late.received_at >= v_before)
         limit 5000) quiet);
  v_count integer;
begin
  perform public.lock_interview_sessions(v_sessions);

  delete from public.interview_events e
   using (select l.session_id  -- looked at again, now that nobody else works on them
            from public.interview_events l
            join public.interview_sessions s on s.session_id = l.session_id
           where l.session_id = any (v_sessions)
             and s.interview_status <> 'in_progress'
           group by l.session_id
          having max(l.received_at) < v_before
             and bool_and(l.applied_at is not null)) quiet
   where e.session_id = quiet.session_id;
  get diagnostics v_count = row_count;
  return v_count;
end;
$$;

-- ------------------------------------------------------------------------------------------------ looking back

-- What happened in this session, in the order in which it happened?
create or replace function public.get_interview_timeline(p_session_id text)
returns setof public.interview_events
language sql
stable
security invoker
set search_path = ''
as $$
  select e.*
    from public.interview_events e
   where e.session_id = p_session_id
   order by e.occurred_at, e.event_id;
$$;

-- What does the ledger alone say of these sessions? The rules of the RPCs once more, as one fold: what an audit
-- compares with must not be the code that it audits.
create or replace function public.fold_interview_ledger(p_session_ids text[])
returns table (
  session_id text, user_id uuid, email text, resume_filename text, job_description_filename text,
  interview_status text, total_questions integer, questions_answered integer, duration_minutes integer,
  score numeric, feedback jsonb, created_at timestamptz, completed_at timestamptz
)
language sql
stable
security invoker
set search_path = ''
as $$
  select f.session_id,
         (f.started ->> 'user_id')::uuid,
         f.started ->> 'email',
         f.started ->> 'resume_filename',
         f.started ->> 'job_description_filename',
         case when f.completed_at is not null then 'completed'
              when f.cancelled then 'cancelled'
              else 'in_progress' end,
         f.total_questions,
         coalesce(f.questions_answered, 0),
         coalesce(f.duration_minutes, 0),
         (f.finished ->> 'score')::numeric,
         nullif(f.finished -> 'feedback', 'null'),
         f.created_at,
         f.completed_at
    from (
      select e.session_id,
             (array_agg(e.payload order by e.occurred_at, e.event_id)
                filter (where e.type = 'interview.started'))[1] as started,
             min(e.occurred_at) filter (where e.type = 'interview.started') as created_at,
             (array_agg(e.payload order by e.occurred_at desc, e.event_id desc)
                filter (where e.type = 'interview.finished'))[1] as finished,
             max(e.occurred_at) filter (where e.type = 'interview.finished') as completed_at,
             bool_or(e.type = 'interview.cancelled') as cancelled,
             max((e.payload ->> 'total_questions')::integer) as total_questions,
             max((e.payload ->> 'questions_answered')::integer) as questions_answered,
             max((e.payload ->> 'duration_minutes')::integer) as duration_minutes
        from public.interview_events e
       where e.session_id = any (p_session_ids)
       group by e.session_id
    ) f
   where f.started is not null;
$$;

-- Do the rows equal their ledger? Looks at the next p_limit sessions after p_after, in order of session_id, and answers
-- {"checked", "last", "found": [{"session_id", "kind", "columns"}]}; "last" is null on the last page. The kinds:
--   behind     the row lacks what the ledger says: rebuild it
--   ahead      the row says more than the ledger: a person called an RPC or edited it; no fault by itself
--   waiting    events wait although their session has a row: the next event, or expire_waiting..., applies them
--   unfounded  the ledger does not hold the start: a person created the session, or the ledger was purged
create or replace function public.verify_interview_sessions(p_after text default '', p_limit integer default 1000)
returns jsonb
language plpgsql
stable
security invoker
set search_path = ''
as $$
declare
  v_page text[] := array(
    select s.session_id
      from public.interview_sessions s
     where s.session_id > p_after
     order by s.session_id
     limit p_limit);
  v_found jsonb;
begin
  select jsonb_agg(jsonb_build_object('session_id', v.session_id, 'kind', v.kind, 'columns', v.columns)
                   order by v.session_id, v.kind)
    into v_found
    from (
      select d.session_id, d.kind, jsonb_agg(d.name order by d.name) as columns
        from public.interview_sessions s
        join public.fold_interview_ledger(v_page) l on l.session_id = s.session_id
       cross join lateral (values
         ('questions_answered', sign(s.questions_answered - l.questions_answered)),
         ('duration_minutes', sign(s.duration_minutes - l.duration_minutes)),
         ('total_questions', sign(coalesce(s.total_questions, -1) - coalesce(l.total_questions, -1))),
         ('interview_status',
           sign(array_position(array['in_progress', 'cancelled', 'completed'], s.interview_status)
                - array_position(array['in_progress', 'cancelled', 'completed'], l.interview_status))),
         ('user_id', case when s.user_id = l.user_id then 0 else -1 end),
         ('created_at', case when s.created_at = l.created_at then 0
                             when s.created_at < l.created_at then 1
                             else -1 end),
         ('email', case when s.created_at = l.created_at and s.email <> l.email then -1 else 0 end),
         ('resume_filename', case when s.created_at = l.created_at
                                   and s.resume_filename is distinct from l.resume_filename then -1 else 0 end),
         ('job_description_filename', case when s.created_at = l.created_at
                                   and s.job_description_filename is distinct from l.job_description_filename
                                   then -1 else 0 end),
         ('completed_at', case when s.completed_at is not distinct from l.completed_at then 0
                               when l.completed_at is null or s.completed_at > l.completed_at then 1
                               else -1 end),
         ('score', case when s.completed_at is not distinct from l.completed_at
                         and s.score is distinct from l.score then -1 else 0 end),
         ('feedback', case when s.completed_at is not distinct from l.completed_at
                            and s.feedback is distinct from l.feedback then -1 else 0 end)
         ) as c (name, distance)
       cross join lateral (select s.session_id, c.name, case when c.distance < 0 then 'behind' else 'ahead' end as kind) d
       where s.session_id = any (v_page)
         and c.distance <> 0
       group by d.session_id, d.kind
      union all
      select distinct e.session_id, 'waiting', '[]'::jsonb
        from public.interview_events e
       where e.session_id = any (v_page)
         and e.applied_at is null
      union all
      select p.session_id, 'unfounded', '[]'::jsonb
        from unnest(v_page) as p (session_id)
       where not exists (
               select
                 from public.interview_events e
                where e.session_id = p.session_id
                  and e.type = 'interview.started')
    ) v;

  return jsonb_build_object(
    'checked', cardinality(v_page),
    'last', case when cardinality(v_page) = p_limit then v_page[p_limit] end,
    'found', coalesce(v_found, '[]'));
end;
$$;

-- Restores one row to what its ledger says, no more and no less, and answers the session. Without its start in the
-- ledger (purged, or created by a person) it is PT404; where the row says more than the ledger (a person called an RPC,
-- or most of the ledger was purged) it is PT409 unless forced; then nothing changes.
create or replace function public.rebuild_interview_session(p_session_id text, p_force boolean default false)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_session public.interview_sessions;
begin
  perform public.lock_interview_sessions(array[p_session_id]);

  if not p_force and exists (
    select
      from public.interview_sessions s
      join public.fold_interview_ledger(array[p_session_id]) l on l.session_id = s.session_id
     where s.session_id = p_session_id
       and (s.questions_answered > l.questions_answered
            or s.duration_minutes > l.duration_minutes
            or s.total_questions > coalesce(l.total_questions, -1)
            or s.created_at < l.created_at
            or s.completed_at > coalesce(l.completed_at, '-infinity')
            or (s.interview_status = 'cancelled' and l.interview_status = 'in_progress'))
  ) then
    raise exception using errcode = 'PT409', message = 'the row says more than its ledger';
  end if;

  insert into public.interview_sessions as s
    (session_id, user_id, email, resume_filename, job_description_filename, interview_status, total_questions,
     questions_answered, duration_minutes, score, feedback, created_at, completed_at)
  select l.session_id, l.user_id, l.email, l.resume_filename, l.job_description_filename, l.interview_status,
         l.total_questions, l.questions_answered, l.duration_minutes, l.score, l.feedback, l.created_at,
         l.completed_at
    from public.fold_interview_ledger(array[p_session_id]) l
  on conflict (session_id) do update
    set (user_id, email, resume_filename, job_description_filename, interview_status, total_questions,
         questions_answered, duration_minutes, score, feedback, created_at, completed_at) = (
      select excluded.user_id, excluded.email, excluded.resume_filename, excluded.job_description_filename,
             excluded.interview_status, excluded.total_questions, excluded.questions_answered,
             excluded.duration_minutes, excluded.score, excluded.feedback, excluded.created_at,
             excluded.completed_at)
  returning * into v_session;

  if not found then
    raise exception using errcode = 'PT404', message = 'the ledger does not hold the start of this session';
  end if;

  update public.interview_events e
     set applied_at = now()
   where e.session_id = p_session_id
     and e.applied_at is null;
  perform public.resolve_dead_interview_events(
    array(select e.event_id from public.interview_events e where e.session_id = p_session_id));
  return to_jsonb(v_session);
end;
$$;

-- ------------------------------------------------------------------------------------- operating the dead letters

-- Who did what to how many dead letters, when and why. Append-only: an action that goes on may count further, and nobody
-- is granted to change or delete what is written.
create table if not exists public.interview_dead_letter_actions (
  id uuid not null,  -- chosen by whoever acts: a long action adds its batches to one row
  began_at timestamptz not null default now(),
  ended_at timestamptz not null default now(),  -- of its last batch
  actor text not null,
  action text not null,
  filter jsonb not null,  -- which letters were asked for
  note text,
  letters integer not null,  -- how many were moved
  outcomes jsonb not null default '{}',  -- of a replay: how many were applied, failed again, are under way
  constraint interview_dead_letter_actions_pkey primary key (id),
  constraint interview_dead_letter_actions_action check (action in ('replay', 'discard', 'restore', 'edit'))
);

comment on table public.interview_dead_letter_actions is 'Who did what to the dead letters; append-only.';

alter table public.interview_dead_letter_actions enable row level security;
revoke all on public.interview_dead_letter_actions from public, anon, authenticated, service_role;
grant select, insert, update (ended_at, letters, outcomes) on public.interview_dead_letter_actions to service_role;
-- No grant lets anyone else in; this says so where grants are looked at last, and holds should one slip in.
drop policy if exists "Only service_role" on public.interview_dead_letter_actions;
create policy "Only service_role" on public.interview_dead_letter_actions
  as restrictive for all to anon, authenticated using (false);

-- The dead letters that a filter means: {"ids", "status", "reason", "type", "session_id", "user_id", "since", "until",
-- "text", "group"}, each optional; "text" is looked for in the detail, times are those of the last failure.
create or replace function public.match_interview_dead_letters(p_filter jsonb)
returns setof public.interview_dead_letters
language sql
stable
security invoker
set search_path = ''
as $$
  select d.*
    from public.interview_dead_letters d
   where (p_filter -> 'ids' is null
          or d.id = any (array(select jsonb_array_elements_text(p_filter -> 'ids')::bigint)))
     and (p_filter ->> 'status' is null or d.status = p_filter ->> 'status')
     and (p_filter ->> 'reason' is null or d.reason = p_filter ->> 'reason')
     and (p_filter ->> 'type' is null or d.type = p_filter ->> 'type')
     and (p_filter ->> 'session_id' is null or d.session_id = p_filter ->> 'session_id')
     and (p_filter ->> 'since' is null or d.last_failed_at >= (p_filter ->> 'since')::timestamptz)
     and (p_filter ->> 'until' is null or d.last_failed_at < (p_filter ->> 'until')::timestamptz)
     and (p_filter ->> 'text' is null or strpos(lower(d.detail), lower(p_filter ->> 'text')) > 0)
     and (p_filter ->> 'user_id' is null or strpos(lower(d.event), lower(p_filter ->> 'user_id')) > 0)
     and (p_filter ->> 'group' is null or d.group_id = p_filter ->> 'group');
$$;

-- A page of the dead letters that a filter means, without their events, the latest first; p_before is the id of the
-- last letter of the page before.
create or replace function public.find_interview_dead_letters(
  p_filter jsonb, p_limit integer default 50, p_before bigint default null)
returns jsonb
language sql
stable
security invoker
set search_path = ''
as $$
  select coalesce(jsonb_agg(to_jsonb(d) - 'event' order by d.id desc), '[]')
    from (
      select *
        from public.match_interview_dead_letters(p_filter)
       where p_before is null or id < p_before
       order by id desc
       limit p_limit) d;
$$;

-- Which letters a filter means: {"ids", "oldest"}, ids in ascending order, the time of the first failure.
create or replace function public.choose_interview_dead_letters(p_filter jsonb)
returns jsonb
language sql
stable
security invoker
set search_path = ''
as $$
  select jsonb_build_object('ids', coalesce(jsonb_agg(d.id order by d.id), '[]'), 'oldest', min(d.first_failed_at))
    from public.match_interview_dead_letters(p_filter) d;
$$;

-- The groups of the dead letters that a filter means, the largest first.
create or replace function public.group_interview_dead_letters(p_filter jsonb, p_limit integer default 50)
returns jsonb
language sql
stable
security invoker
set search_path = ''
as $$
  select coalesce(jsonb_agg(to_jsonb(g) order by g.letters desc, g."group"), '[]')
    from (
      select d.group_id as "group", d.reason, d.type, max(d.detail) as detail,
             count(*) as letters, sum(d.attempts) as attempts,
             min(d.first_failed_at) as first_failed_at, max(d.last_failed_at) as last_failed_at,
             max(d.id) as sample
        from public.match_interview_dead_letters(p_filter) d
       group by 1, 2, 3
       order by count(*) desc
       limit p_limit) g;
$$;

-- How many letters are open or replayed: {status: {reason: count}}.
create or replace function public.count_interview_dead_letters()
returns jsonb
language sql
stable
security invoker
set search_path = ''
as $$
  select coalesce(jsonb_object_agg(c.status, c.reasons), '{}')
    from (
      select r.status, jsonb_object_agg(r.reason, r.letters) as reasons
        from (
          select d.status, d.reason, count(*) as letters
            from public.interview_dead_letters d
           where d.status in ('open', 'replayed')
           group by d.status, d.reason) r
       group by r.status) c;
$$;

-- Adds to the row of an action, or makes it: who acted, on what and why stands as it was first told. p_action: {"id",
-- "actor", "action", "filter", "note"?}.
create or replace function public.note_interview_dead_letter_action(
  p_action jsonb, p_letters integer, p_outcomes jsonb default null)
returns void
language sql
security invoker
set search_path = ''
as $$
  insert into public.interview_dead_letter_actions as a (id, actor, action, filter, note, letters, outcomes)
  values ((p_action ->> 'id')::uuid, p_action ->> 'actor', p_action ->> 'action', p_action -> 'filter',
          p_action ->> 'note', greatest(p_letters, 0), coalesce(p_outcomes, '{}'))
  on conflict (id) do update
    set letters = greatest(a.letters + p_letters, 0),
        outcomes = coalesce(p_outcomes, a.outcomes),
        ended_at = now();
$$;

-- Moves dead letters, and notes it. Answers those that were moved: [{"id", "event"}], in order of id; a letter that is
-- not where the action begins is left as it is.
--   replay   open or replayed --> replayed    (whoever calls publishes the events)
--   reopen   replayed --> open                (could not be published; taken off the count of its replay)
--   discard  open or replayed --> discarded
--   restore  discarded --> open               (unless the same event is an open letter by now)
create or replace function public.move_interview_dead_letters(p_action jsonb, p_move text, p_ids bigint[])
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_moved jsonb;
begin
  with moved as (
    update public.interview_dead_letters d
       set status = case p_move when 'replay' then 'replayed' when 'discard' then 'discarded' else 'open' end,
           resolved_at = case when p_move = 'discard' then now() end,
           note = case when p_move = 'discard' then p_action ->> 'note' else d.note end
     where d.id = any (p_ids)
       and case p_move
             when 'replay' then d.status in ('open', 'replayed')
             when 'reopen' then d.status = 'replayed'
             when 'discard' then d.status in ('open', 'replayed')
             when 'restore' then d.status = 'discarded'
               and not exists (
                 select from public.interview_dead_letters o
                  where md5(o.event) = md5(d.event) and o.status in ('open', 'replayed'))
               and d.id in (  -- of those of one event, the latest
                 select max(o.id) from public.interview_dead_letters o
                  where o.id = any (p_ids) and o.status = 'discarded'
                  group by md5(o.event))
           end
    returning d.id, d.event
  )
  select coalesce(jsonb_agg(jsonb_build_object('id', m.id, 'event', m.event) order by m.id), '[]')
    into v_moved
    from moved m;
  perform public.note_interview_dead_letter_action(
    p_action, jsonb_array_length(v_moved) * case p_move when 'reopen' then -1 else 1 end);
  return v_moved;
end;
$$;

-- Applies an event in the stead of a dead letter, closes the letter as replaced, and notes it, all or nothing: raises
-- PT422 where the event is rejected, PT409 where the letter is not open. Answers what became of the event, as
-- apply_interview_events does.
create or replace function public.replace_interview_dead_letter(p_action jsonb, p_id bigint, p_event jsonb)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_answer jsonb;
begin
  v_answer := public.apply_interview_events(jsonb_build_array(p_event)) -> 0;
  if v_answer ->> 'outcome' = 'rejected' then
    raise exception using errcode = 'PT422',
      message = format('rejected: %s: %s', v_answer ->> 'reason', v_answer ->> 'detail');
  end if;

  update public.interview_dead_letters d
     set status = 'resolved',
         resolved_at = now(),
         replaced_by = (p_event ->> 'id')::uuid,
         note = p_action ->> 'note'
   where d.id = p_id
     and (d.status in ('open', 'replayed') or d.resolved_at = now());  -- resolved by what was just applied
  if not found then
    raise exception using errcode = 'PT409', message = 'this dead letter is not open';
  end if;
  perform public.note_interview_dead_letter_action(
    p_action, 1, jsonb_build_object(v_answer ->> 'outcome', 1));
  return v_answer;
end;
$$;

-- Which of these letters are not under way any more: {status: [id]}.
create or replace function public.settle_interview_dead_letters(p_ids bigint[])
returns jsonb
language sql
stable
security invoker
set search_path = ''
as $$
  select coalesce(jsonb_object_agg(s.status, s.ids), '{}')
    from (
      select d.status, jsonb_agg(d.id) as ids
        from public.interview_dead_letters d
       where d.id = any (p_ids)
         and d.status <> 'replayed'
       group by d.status) s;
$$;

revoke all on function
  public.delete_interview_events_of_deleted_sessions(),
  public.received_interview_event(jsonb),
  public.record_dead_interview_events(jsonb),
  public.group_of_interview_dead_letter(text, text, text),
  public.match_interview_dead_letters(jsonb),
  public.find_interview_dead_letters(jsonb, integer, bigint),
  public.choose_interview_dead_letters(jsonb),
  public.group_interview_dead_letters(jsonb, integer),
  public.count_interview_dead_letters(),
  public.note_interview_dead_letter_action(jsonb, integer, jsonb),
  public.move_interview_dead_letters(jsonb, text, bigint[]),
  public.replace_interview_dead_letter(jsonb, bigint, jsonb),
  public.settle_interview_dead_letters(bigint[]),
  public.lock_interview_sessions(text[]),
  public.resolve_dead_interview_events(uuid[]),
  public.apply_interview_event_pack(jsonb),
  public.apply_or_halve_interview_events(jsonb, integer),
  public.apply_interview_events(jsonb),
  public.apply_interview_events_summary(jsonb),
  public.expire_waiting_interview_events(interval),
  public.purge_interview_events(interval),
  public.get_interview_timeline(text),
  public.fold_interview_ledger(text[]),
  public.verify_interview_sessions(text, integer),
  public.rebuild_interview_session(text, boolean)
from public, anon, authenticated, service_role;
grant execute on function
  public.received_interview_event(jsonb),
  public.record_dead_interview_events(jsonb),
  public.group_of_interview_dead_letter(text, text, text),
  public.match_interview_dead_letters(jsonb),
  public.find_interview_dead_letters(jsonb, integer, bigint),
  public.choose_interview_dead_letters(jsonb),
  public.group_interview_dead_letters(jsonb, integer),
  public.count_interview_dead_letters(),
  public.note_interview_dead_letter_action(jsonb, integer, jsonb),
  public.move_interview_dead_letters(jsonb, text, bigint[]),
  public.replace_interview_dead_letter(jsonb, bigint, jsonb),
  public.settle_interview_dead_letters(bigint[]),
  public.lock_interview_sessions(text[]),
  public.resolve_dead_interview_events(uuid[]),
  public.apply_interview_event_pack(jsonb),
  public.apply_or_halve_interview_events(jsonb, integer),
  public.apply_interview_events(jsonb),
  public.apply_interview_events_summary(jsonb),
  public.expire_waiting_interview_events(interval),
  public.purge_interview_events(interval),
  public.get_interview_timeline(text),
  public.fold_interview_ledger(text[]),
  public.verify_interview_sessions(text, integer),
  public.rebuild_interview_session(text, boolean)
to service_role;

commit;

notify pgrst, 'reload schema';
