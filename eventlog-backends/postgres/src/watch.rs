//! What all sessions of a process share: the connection that keeps their leases, and the look for news.

use crate::{
    PostgresLog,
    error::{doing, is_lost},
    log::Role,
    session::Shared,
};
use postrider_core::{Error, ErrorKind, Result, clock::Moment};
use sqlx::{PgConnection, Row as _};
use std::{
    sync::{Arc, Mutex as StdMutex, PoisonError, Weak},
    time::Duration,
};
use tokio::sync::Mutex;

/// One connection for the renewals and polls of all sessions of a log's handle: neither waits for the application's pool.
#[derive(Default)]
pub(crate) struct Watch {
    connection: Mutex<Option<PgConnection>>,
    sessions: StdMutex<Vec<Weak<Shared>>>,
    polled_at: StdMutex<Moment>,
}

impl Watch {
    /// Runs `work` on the connection, for at most `limit`.
    pub(crate) async fn with_connection<T>(
        &self,
        log: &PostgresLog,
        limit: Duration,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T>,
    ) -> Result<T> {
        let work = async {
            let mut guard = self.connection.lock().await;
            let mut connection = match guard.take() {
                Some(connection) => connection,
                None => log.own_connection(Role::Heart).await?,
            };
            // Taken out for the time of the work: cut off, the connection is dropped with whatever it was doing.
            let result = work(&mut connection).await;
            if !result.as_ref().is_err_and(is_lost) {
                *guard = Some(connection);
            }
            result
        };
        tokio::time::timeout(limit, work)
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "Postgres did not answer in time")))
    }

    pub(crate) fn register(&self, session: &Arc<Shared>) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(session));
    }

    /// How long until the next look is due, if that is every `interval`; zero once for whoever is to look.
    pub(crate) fn due_in(&self, now: Moment, interval: Duration) -> Duration {
        let mut polled_at = self.polled_at.lock().unwrap_or_else(PoisonError::into_inner);
        let left = polled_at.saturating_add(interval).saturating_sub(now);
        if left.is_zero() {
            *polled_at = now;
        }
        left
    }

    /// Looks, for all sessions that wait, whether there is something to claim, and wakes those for which there is.
    pub(crate) async fn poll(&self, log: &PostgresLog) {
        let waiting: Vec<Arc<Shared>> = {
            let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            sessions
                .iter()
                .filter_map(Weak::upgrade)
                .filter(|session| session.is_waiting())
                .collect()
        };
        match self.look(log, &waiting).await {
            Ok(found) => found
                .into_iter()
                .filter_map(|n| waiting.get(n))
                .for_each(|session| session.tell()),
            Err(error) => {
                tracing::debug!(
                    error = error.to_chain(),
                    "the look for news failed: the sessions look for themselves"
                );
                waiting.iter().for_each(|session| session.tell());
            }
        }
    }

    async fn look(&self, log: &PostgresLog, waiting: &[Arc<Shared>]) -> Result<Vec<usize>> {
        let (mut n, mut mailbox, mut lane, mut cursor) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut parked, mut scheduled) = (Vec::new(), Vec::new());
        let (mut wanting, mut wanted) = (Vec::new(), Vec::new());
        for (at, session) in waiting.iter().enumerate() {
            let at = i32::try_from(at).unwrap_or(i32::MAX);
            let outlook = session.outlook();
            for (of, behind) in &outlook.cursors {
                n.push(at);
                mailbox.push(session.mailbox());
                lane.push(*of);
                cursor.push(*behind);
                parked.push(outlook.parked_from);
                scheduled.push(outlook.scheduled_from);
            }
            if outlook.cursors.len() < 64 {
                wanting.push(at);
                wanted.push(session.mailbox());
            }
        }
        self.with_connection(log, Duration::from_secs(3), async |connection| {
            let poll = sqlx::query(log.sql().poll.clone())
                .bind(n)
                .bind(mailbox)
                .bind(lane)
                .bind(cursor);
            let poll = poll.bind(parked).bind(scheduled).bind(wanting).bind(wanted);
            let rows = poll.fetch_all(connection).await.map_err(doing("looking for news"))?;
            Ok(rows
                .iter()
                .filter_map(|row| usize::try_from(row.get::<i32, _>(0)).ok())
                .collect())
        })
        .await
    }
}
