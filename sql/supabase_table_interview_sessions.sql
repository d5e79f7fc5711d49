-- Table 5: interview_sessions
--
-- One row per interview, its RPCs, trigger, row level security and views.
-- Paste it in Supabase's SQL editor and run it; running it again changes nothing. Postgres 15 or newer.
-- Then run supabase_worker_interview_events.sql, if workers are to apply events.
--
-- The rules of a row (each stands in one RPC below; events in any order leave the same row):
--
--   created_at, user_id, email, file names   of the earliest start
--   questions_answered, duration_minutes,
--   total_questions                          the greatest ever reported: they never go back
--   interview_status                         in_progress --cancel--> cancelled --complete--> completed
--                                            in_progress --------complete--------> completed
--                                            completed   --cancel--> completed (finished wins)
--   score, feedback, completed_at            of the latest completion, which replaces all three

begin;

create table if not exists public.interview_sessions (
  id uuid not null default gen_random_uuid(),
  user_id uuid not null,
  email text not null,
  session_id text not null,
  resume_filename text,
  job_description_filename text,
  interview_status text not null default 'in_progress',
  total_questions integer,
  questions_answered integer not null default 0,
  duration_minutes integer not null default 0,
  score numeric,
  feedback jsonb,
  created_at timestamptz not null default now(),
  completed_at timestamptz,
  constraint interview_sessions_pkey primary key (id),
  constraint interview_sessions_session_id_key unique (session_id),
  constraint interview_sessions_user_id_fkey foreign key (user_id) references auth.users (id) on delete cascade,
  constraint interview_sessions_session_id_length check (char_length(session_id) between 1 and 200),
  constraint interview_sessions_status check (interview_status in ('in_progress', 'completed', 'cancelled')),
  constraint interview_sessions_total_questions_not_negative check (total_questions >= 0),
  constraint interview_sessions_questions_answered_not_negative check (questions_answered >= 0),
  constraint interview_sessions_duration_minutes_not_negative check (duration_minutes >= 0),
  constraint interview_sessions_score_range check (score between 0 and 100),
  constraint interview_sessions_feedback_object check (jsonb_typeof(feedback) = 'object')
) with (fillfactor = 85);  -- room for progress updates on the same page (no indexed column changes)

comment on table public.interview_sessions is 'One row per interview; session_id comes from the backend API.';

-- A user's history, newest first; it also serves the foreign key.
create index if not exists interview_sessions_user_id_created_at_idx
  on public.interview_sessions (user_id, created_at desc);

-- ---------------------------------------------------------------------------------------------- completed_at

-- Keeps completed_at true to the status: now() where nobody gave a time, null where it is not completed.
create or replace function public.set_interview_completed_at()
returns trigger
language plpgsql
security invoker
set search_path = ''
as $$
begin
  if new.interview_status = 'completed' then
    new.completed_at := coalesce(new.completed_at, now());
  else
    new.completed_at := null;
  end if;
  return new;
end;
$$;

create or replace trigger interview_sessions_completed_at
  before insert or update of interview_status, completed_at on public.interview_sessions
  for each row execute function public.set_interview_completed_at();

-- The ledger finds its session by session_id: renamed, a session would leave its events behind for good.
create or replace function public.keep_interview_session_id()
returns trigger
language plpgsql
security invoker
set search_path = ''
as $$
begin
  raise exception using errcode = '42501', message = 'the session_id of an interview session never changes';
end;
$$;

create or replace trigger interview_sessions_keep_session_id
  before update of session_id on public.interview_sessions
  for each row when (old.session_id is distinct from new.session_id)
  execute function public.keep_interview_session_id();

-- ------------------------------------------------------------------------------------------ row level security

alter table public.interview_sessions enable row level security;

drop policy if exists "Users see their own interview sessions" on public.interview_sessions;
create policy "Users see their own interview sessions"
  on public.interview_sessions for select to authenticated
  using ((select auth.uid()) = user_id);

drop policy if exists "Users create their own interview sessions" on public.interview_sessions;
create policy "Users create their own interview sessions"
  on public.interview_sessions for insert to authenticated
  with check ((select auth.uid()) = user_id);

drop policy if exists "Users update their own interview sessions" on public.interview_sessions;
create policy "Users update their own interview sessions"
  on public.interview_sessions for update to authenticated
  using ((select auth.uid()) = user_id)
  with check ((select auth.uid()) = user_id);

-- Supabase has granted everything to everyone or nothing to anyone, by the age of the project: say it all.
revoke all on public.interview_sessions from public, anon, authenticated, service_role;
grant select, insert, update on public.interview_sessions to authenticated;
grant select, insert, update, delete on public.interview_sessions to service_role;

-- ------------------------------------------------------------------------------------------------------- RPCs
-- Each answers the session as jsonb. A session that is not there (or not yours) is PT404, HTTP 404; one that
-- belongs to somebody else is PT409, HTTP 409. The last parameters, all optional, are for events that tell
-- when they happened; a person's call happens now.

-- Starts a session; starting it again is harmless: the earliest start gives the names, a total only grows.
create or replace function public.create_interview_session(
  p_user_id uuid,
  p_email text,
  p_session_id text,
  p_resume_filename text default null,
  p_job_description_filename text default null,
  p_total_questions integer default null,
  p_created_at timestamptz default null
)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_session public.interview_sessions;
  v_created_at timestamptz := coalesce(p_created_at, now());
begin
  insert into public.interview_sessions
    (user_id, email, session_id, resume_filename, job_description_filename, total_questions, created_at)
  values
    (p_user_id, p_email, p_session_id, p_resume_filename, p_job_description_filename, p_total_questions,
     v_created_at)
  on conflict (session_id) do nothing
  returning * into v_session;
  if found then
    return to_jsonb(v_session);
  end if;

  update public.interview_sessions s
     set total_questions = greatest(s.total_questions, p_total_questions)
   where s.session_id = p_session_id
     and s.user_id = p_user_id
  returning * into v_session;
  if not found then
    raise exception using errcode = 'PT409', message = 'the session belongs to another user';
  end if;

  if v_created_at <= v_session.created_at then
    update public.interview_sessions s
       set email = p_email,
           resume_filename = p_resume_filename,
           job_description_filename = p_job_description_filename,
           created_at = v_created_at
     where s.id = v_session.id
    returning * into v_session;
  end if;
  return to_jsonb(v_session);
end;
$$;

-- Reports progress; numbers are cumulative, the greatest ever reported stands, null says nothing.
create or replace function public.update_interview_progress(
  p_session_id text,
  p_questions_answered integer default null,
  p_duration_minutes integer default null,
  p_total_questions integer default null
)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_session public.interview_sessions;
begin
  if least(p_questions_answered, p_duration_minutes, p_total_questions) < 0 then
    raise exception using errcode = '22023', message = 'progress cannot be negative';
  end if;

  update public.interview_sessions s
     set questions_answered = greatest(s.questions_answered, p_questions_answered),
         duration_minutes = greatest(s.duration_minutes, p_duration_minutes),
         total_questions = greatest(s.total_questions, p_total_questions)
   where s.session_id = p_session_id
  returning * into v_session;

  if not found then
    raise exception using errcode = 'PT404', message = 'no such interview session';
  end if;
  return to_jsonb(v_session);
end;
$$;

-- Completes a session; completing it again replaces score and feedback, unless the call tells of an earlier time.
create or replace function public.complete_interview(
  p_session_id text,
  p_score numeric default null,
  p_feedback jsonb default null,
  p_completed_at timestamptz default null
)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_session public.interview_sessions;
  v_completed_at timestamptz := coalesce(p_completed_at, now());
begin
  -- Here, because a violated constraint would repeat the whole row to the caller's log.
  if p_score not between 0 and 100 then
    raise exception using errcode = '22023', message = 'the score must be from 0 to 100';
  end if;
  if jsonb_typeof(p_feedback) <> 'object' then
    raise exception using errcode = '22023', message = 'the feedback must be a JSON object';
  end if;

  update public.interview_sessions s
     set interview_status = 'completed',
         score = p_score,
         feedback = p_feedback,
         completed_at = v_completed_at
   where s.session_id = p_session_id
     and (s.completed_at is null or s.completed_at <= v_completed_at)
  returning * into v_session;

  if not found then
    select * into v_session from public.interview_sessions s where s.session_id = p_session_id;
  end if;
  if not found then
    raise exception using errcode = 'PT404', message = 'no such interview session';
  end if;
  return to_jsonb(v_session);
end;
$$;

-- Cancels a session in progress; a completed one stays completed. The table has no column for the reason:
-- that of an event stays in its ledger (supabase_worker_interview_events.sql), that of a person's call is not kept.
create or replace function public.cancel_interview(p_session_id text, p_reason text default null)
returns jsonb
language plpgsql
security invoker
set search_path = ''
as $$
declare
  v_session public.interview_sessions;
begin
  update public.interview_sessions s
     set interview_status = 'cancelled'
   where s.session_id = p_session_id
     and s.interview_status = 'in_progress'
  returning * into v_session;

  if not found then
    select * into v_session from public.interview_sessions s where s.session_id = p_session_id;
  end if;
  if not found then
    raise exception using errcode = 'PT404', message = 'no such interview session';
  end if;
  return to_jsonb(v_session);
end;
$$;

-- A user's interviews, newest first.
create or replace function public.get_user_interview_history(p_user_id uuid)
returns setof public.interview_sessions
language sql
stable
security invoker
set search_path = ''
as $$
  select s.*
    from public.interview_sessions s
   where s.user_id = p_user_id
   order by s.created_at desc, s.session_id;
$$;

revoke all on function
  public.set_interview_completed_at(),
  public.keep_interview_session_id(),
  public.create_interview_session(uuid, text, text, text, text, integer, timestamptz),
  public.update_interview_progress(text, integer, integer, integer),
  public.complete_interview(text, numeric, jsonb, timestamptz),
  public.cancel_interview(text, text),
  public.get_user_interview_history(uuid)
from public, anon, authenticated, service_role;
grant execute on function
  public.create_interview_session(uuid, text, text, text, text, integer, timestamptz),
  public.update_interview_progress(text, integer, integer, integer),
  public.complete_interview(text, numeric, jsonb, timestamptz),
  public.cancel_interview(text, text),
  public.get_user_interview_history(uuid)
to authenticated, service_role;

-- ------------------------------------------------------------------------------------------------------ views
-- Each user sees the figures of own sessions, service_role those of all.

-- How is each user doing?
create or replace view public.interview_user_statistics with (security_invoker = on) as
select
  user_id,
  count(*) as total_interviews,
  count(*) filter (where interview_status = 'completed') as completed_interviews,
  avg(score) as average_score,
  sum(duration_minutes) as total_time_minutes
from public.interview_sessions
group by user_id;

-- What share of interviews, in per cent, is completed?
create or replace view public.interview_completion_rate with (security_invoker = on) as
select
  count(*) as total_sessions,
  count(*) filter (where interview_status = 'completed') as completed_sessions,
  round(count(*) filter (where interview_status = 'completed') * 100.0 / nullif(count(*), 0), 2)
    as completion_rate
from public.interview_sessions;

-- How do the scores lie?
create or replace view public.interview_score_by_status with (security_invoker = on) as
select
  interview_status,
  count(*) as session_count,
  avg(score) as average_score,
  min(score) as min_score,
  max(score) as max_score
from public.interview_sessions
where score is not null
group by interview_status;

-- What happened on each day (UTC) on which an interview started? For charts.
create or replace view public.interview_daily_activity with (security_invoker = on) as
select
  (created_at at time zone 'utc')::date as day,
  count(*) as started,
  count(*) filter (where interview_status = 'completed') as completed,
  count(*) filter (where interview_status = 'cancelled') as cancelled,
  avg(score) as average_score,
  sum(duration_minutes) as total_time_minutes
from public.interview_sessions
group by 1;

revoke all on
  public.interview_user_statistics, public.interview_completion_rate, public.interview_score_by_status,
  public.interview_daily_activity
from public, anon, authenticated, service_role;
grant select on
  public.interview_user_statistics, public.interview_completion_rate, public.interview_score_by_status,
  public.interview_daily_activity
to authenticated, service_role;

commit;

notify pgrst, 'reload schema';
