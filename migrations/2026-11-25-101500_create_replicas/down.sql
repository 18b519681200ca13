DROP TABLE shared_counters;
DROP TABLE replicas;
