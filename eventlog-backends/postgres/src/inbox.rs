//! Receipts, and who waits.

use crate::{PostgresLog, error::doing, log::unexpected, row::lane_of};
use async_trait::async_trait;
use postrider_core::{
    GroupName, Mailbox, Result,
    log::{Admission, Arrival, InboxLog, Lent},
};
use sqlx::PgConnection;

#[async_trait]
impl InboxLog for PostgresLog {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let connection: &mut PgConnection = tx.get_mut()?;
        crate::transaction::check(connection).await?;
        if arrivals.is_empty() {
            return Ok(Vec::new());
        }
        let mailbox = self.mailbox_in(connection, &Mailbox::Inbox(group.clone())).await?;
        let ids: Vec<_> = arrivals.iter().map(|a| *a.id.as_uuid()).collect();
        let lanes: Vec<i16> = arrivals.iter().map(|a| lane_of(a.key.as_deref(), a.id)).collect();
        let topics: Vec<&str> = arrivals.iter().map(|a| a.topic.as_str()).collect();
        let keys: Vec<Option<&str>> = arrivals.iter().map(|a| a.key.as_deref()).collect();
        let own: Vec<bool> = arrivals.iter().map(|a| a.was_parked).collect();
        let admit = sqlx::query_scalar::<_, i32>(self.sql().admit.clone())
            .bind(mailbox)
            .bind(ids)
            .bind(lanes)
            .bind(topics)
            .bind(keys)
            .bind(own);
        let answers = admit.fetch_all(connection).await.map_err(doing("admitting messages"))?;
        if answers.len() != arrivals.len() {
            return Err(unexpected("the inbox did not answer for every message"));
        }
        let admission = |answer| match answer {
            0 => Admission::New,
            1 => Admission::Duplicate,
            2 => Admission::Parked,
            _ => Admission::HeldBack,
        };
        Ok(answers.into_iter().map(admission).collect())
    }
}
