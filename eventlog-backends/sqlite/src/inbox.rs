//! Receipts, and who waits.

use crate::{SqliteLog, error::doing, row::micros};
use async_trait::async_trait;
use postrider_core::{
    GroupName, Mailbox, Result,
    log::{Admission, Arrival, InboxLog, Lent},
};
use sqlx::SqliteConnection;

#[async_trait]
impl InboxLog for SqliteLog {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let connection: &mut SqliteConnection = tx.get_mut()?;
        crate::transaction::check(connection)?;
        if arrivals.is_empty() {
            return Ok(Vec::new());
        }
        let failed = doing("admitting messages");
        let mailbox = self.mailbox_in(connection, &Mailbox::Inbox(group.clone())).await?;
        let asked = arrivals.iter().map(|arrival| {
            let id = format!("{:X}", arrival.id.as_uuid().as_simple());
            serde_json::json!([id, arrival.topic.as_str(), arrival.key, arrival.was_parked])
        });
        let asked = serde_json::Value::Array(asked.collect()).to_string();
        let answers = sqlx::query_scalar::<_, i64>(self.sql().admit.clone())
            .bind(mailbox)
            .bind(&asked);
        let answers = answers.fetch_all(&mut *connection).await.map_err(&failed)?;
        // One writer at a time: nothing comes between the answers and the receipts.
        let new: Vec<String> = arrivals
            .iter()
            .zip(&answers)
            .filter(|(_, answer)| **answer == 0)
            .map(|(arrival, _)| format!("{:X}", arrival.id.as_uuid().as_simple()))
            .collect();
        if !new.is_empty() {
            let receipts = sqlx::query(self.sql().add_receipts.clone()).bind(mailbox);
            let receipts = receipts
                .bind(serde_json::json!(new).to_string())
                .bind(micros(self.clock().now()));
            receipts.execute(connection).await.map_err(failed)?;
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
