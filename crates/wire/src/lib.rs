//! The words reuseportd, its workers and its clients exchange
