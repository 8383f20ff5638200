//! The Postgres log against the suite: two handles on one database, as two processes have it.

use crate::fixture::PostgresFixture;
use postrider_testkit::log_conformance;

log_conformance!(PostgresFixture::new().await);
