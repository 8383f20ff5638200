//! The Postgres log against the suite: two handles on one database, as two processes have it.

mod fixture;

use fixture::PostgresFixture;
use postrider_testkit::log_conformance;

log_conformance!(PostgresFixture::new().await);
