//! The registry of a group's members.

use crate::{SqliteLog, error::doing, log::unexpected, row::micros};
use postrider_core::{
    GroupName, Result,
    log::{GroupMember, Owner, RegisteredMember},
};
use sqlx::Row as _;
use std::time::Duration;
use uuid::Uuid;

impl SqliteLog {
    pub(crate) async fn register_member(
        &self,
        group: &GroupName,
        member: &GroupMember,
        retention: Duration,
    ) -> Result<()> {
        let failed = doing("registering a member of a group");
        let mut tx = self.pool().begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        let now = micros(self.clock().now());
        let forget = sqlx::query(self.sql().forget_members.clone())
            .bind(group.as_str())
            .bind(now.saturating_sub(span(retention)));
        forget.execute(&mut *tx).await.map_err(&failed)?;
        let register = sqlx::query(self.sql().register_member.clone())
            .bind(group.as_str())
            .bind(member.owner.as_uuid().as_bytes().to_vec())
            .bind(serde_json::json!(member.types).to_string())
            .bind(serde_json::json!(member.topics).to_string())
            .bind(now);
        register.execute(&mut *tx).await.map_err(&failed)?;
        tx.commit().await.map_err(failed)
    }

    pub(crate) async fn list_members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        let failed = doing("listing the members of a group");
        let mut connection = self.pool().acquire().await.map_err(&failed)?;
        let now = micros(self.clock().now());
        let list = sqlx::query(self.sql().members.clone())
            .bind(group.as_str())
            .bind(now.saturating_sub(span(retention)));
        let rows = list.fetch_all(&mut *connection).await.map_err(&failed)?;
        let texts = |row, column| -> Result<Vec<String>> {
            let text: &str = sqlx::sqlite::SqliteRow::try_get(row, column).map_err(&failed)?;
            serde_json::from_str(text)
                .map_err(|error| unexpected("the registration of a member cannot be read").because(error))
        };
        let ago = |time: i64| Duration::from_micros(u64::try_from(now.saturating_sub(time)).unwrap_or(0));
        let member = |row| {
            let owner: &[u8] = sqlx::sqlite::SqliteRow::try_get(row, 0).map_err(&failed)?;
            let owner = Uuid::from_slice(owner)
                .map_err(|error| unexpected("the registration of a member cannot be read").because(error))?;
            let (first, seen): (i64, i64) = (row.try_get(3).map_err(&failed)?, row.try_get(4).map_err(&failed)?);
            let member = GroupMember::new(Owner::from_uuid(owner), texts(row, 1)?, texts(row, 2)?);
            Ok(RegisteredMember::new(member, ago(first), ago(seen)))
        };
        rows.iter().map(member).collect()
    }
}

/// A duration in microseconds, as far as they go.
fn span(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
