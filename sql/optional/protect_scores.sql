-- Optional: candidates may not write their own score and feedback.
--
-- Without it, a signed-in user may complete an own session with a score, as the examples of the table's guide do.
-- With it, completing takes service_role: even a completion without a score would, being later, outdo the worker's.
-- A user may still start, report progress and cancel.
-- Run it after supabase_table_interview_sessions.sql; running it again changes nothing. To undo it:
--   drop function public.refuse_scores_by_candidates() cascade;

begin;

create or replace function public.refuse_scores_by_candidates()
returns trigger
language plpgsql
security invoker
set search_path = ''
as $$
begin
  if current_user in ('anon', 'authenticated') then
    raise exception using errcode = 'PT403', message = 'completing and scoring an interview is not the candidate''s';
  end if;
  return new;
end;
$$;
revoke all on function public.refuse_scores_by_candidates() from public, anon, authenticated, service_role;

drop trigger if exists interview_sessions_protect_scores_at_insert on public.interview_sessions;
create trigger interview_sessions_protect_scores_at_insert
  before insert on public.interview_sessions
  for each row when (coalesce(new.score::text, new.feedback::text, new.completed_at::text) is not null)
  execute function public.refuse_scores_by_candidates();

drop trigger if exists interview_sessions_protect_scores on public.interview_sessions;
create trigger interview_sessions_protect_scores
  before update on public.interview_sessions
  for each row when ((new.score, new.feedback, new.completed_at)
                      is distinct from (old.score, old.feedback, old.completed_at))
  execute function public.refuse_scores_by_candidates();

commit;
