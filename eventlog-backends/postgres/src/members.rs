//! The registry of a group's members.

use crate::{PostgresLog, error::doing, row::secs};
use postrider_core::{
    GroupName, Result,
    log::{GroupMember, Owner, RegisteredMember},
};
use sqlx::{Row as _, types::Uuid};
use std::time::Duration;

impl PostgresLog {
    pub(crate) async fn register_member(
        &self,
        group: &GroupName,
        member: &GroupMember,
        retention: Duration,
    ) -> Result<()> {
        let failed = doing("registering a member of a group");
        let mut connection = self.own("registering a member of a group").await?;
        let register = sqlx::query(self.sql().register_member.clone())
            .bind(group.as_str())
            .bind(*member.owner.as_uuid())
            .bind(&member.types)
            .bind(&member.topics)
            .bind(secs(retention));
        register.execute(&mut *connection).await.map_err(failed)?;
        Ok(())
    }

    pub(crate) async fn list_members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        let failed = doing("listing the members of a group");
        let mut connection = self.own("listing the members of a group").await?;
        let list = sqlx::query(self.sql().members.clone())
            .bind(group.as_str())
            .bind(secs(retention));
        let rows = list.fetch_all(&mut *connection).await.map_err(&failed)?;
        let member = |row: &sqlx::postgres::PgRow| {
            let ago = |column| -> sqlx::Result<Duration> {
                let secs = row.try_get::<f64, _>(column)?.max(0.0);
                Ok(Duration::try_from_secs_f64(secs).unwrap_or(Duration::MAX))
            };
            let owner = Owner::from_uuid(row.try_get::<Uuid, _>(0)?);
            let (types, topics): (Vec<String>, Vec<String>) = (row.try_get(1)?, row.try_get(2)?);
            Ok(RegisteredMember::new(
                GroupMember::new(owner, types, topics),
                ago(3)?,
                ago(4)?,
            ))
        };
        let members: sqlx::Result<_> = rows.iter().map(member).collect();
        members.map_err(failed)
    }
}
