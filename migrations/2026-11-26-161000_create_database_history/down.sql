DROP FUNCTION database_history();
