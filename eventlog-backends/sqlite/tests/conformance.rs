//! The SQLite log against the suite: two handles on one file, as two processes have it.

use postrider_core::EventLog;
use postrider_sqlite::{SqliteLog, SqliteOptions};
use postrider_testkit::{log::ClockedLog, log_conformance};

log_conformance!({
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("log.db");
    ClockedLog::with_handles(|clock| {
        let options = SqliteOptions::default().with_clock(clock).with_durable(false);
        let file = file.clone();
        async move { EventLog::from(SqliteLog::open_with(file, options).await.unwrap()) }
    })
    .await
    .keeping(dir)
});
