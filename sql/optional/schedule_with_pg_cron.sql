-- Optional: the maintenance that `celery -A worker beat` schedules, by pg_cron instead. Use one of the two.
--
-- Enable pg_cron first (Database, Extensions). Run it after supabase_worker_interview_events.sql; running it again
-- changes nothing; where there is no pg_cron, it says so and does nothing. To undo it:
--   select cron.unschedule('expire waiting interview events'), cron.unschedule('purge interview events');

do $$
begin
  if not exists (select from pg_catalog.pg_extension where extname = 'pg_cron') then
    raise notice 'no pg_cron here: nothing done';
    return;
  end if;
  perform cron.schedule('expire waiting interview events', '*/5 * * * *',
    $job$ select public.expire_waiting_interview_events('24 hours') $job$);
  perform cron.schedule('purge interview events', '*/5 * * * *',
    $job$ select public.purge_interview_events('90 days') $job$);
end;
$$;
