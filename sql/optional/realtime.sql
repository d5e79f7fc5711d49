-- Optional: a front end watches sessions live, through Supabase Realtime.
--
-- Row level security holds: each user is told of own sessions only. Run it after supabase_table_interview_sessions.sql;
-- running it again changes nothing; where there is no Realtime, it says so and does nothing. To undo it:
--   alter publication supabase_realtime drop table public.interview_sessions;
--
-- In the front end:
--
--   supabase
--     .channel('my-interview')
--     .on('postgres_changes',
--       { event: 'UPDATE', schema: 'public', table: 'interview_sessions', filter: `session_id=eq.${sessionId}` },
--       ({ new: session }) => show(session.questions_answered, session.interview_status))
--     .subscribe();

do $$
begin
  if not exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
    raise notice 'no publication supabase_realtime here: nothing done';
  elsif not exists (
    select
      from pg_catalog.pg_publication_tables
     where pubname = 'supabase_realtime'
       and schemaname = 'public'
       and tablename = 'interview_sessions'
  ) then
    alter publication supabase_realtime add table public.interview_sessions;
  end if;
end;
$$;
