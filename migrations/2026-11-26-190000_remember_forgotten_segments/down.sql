DROP TABLE usage_forgotten_segments;
