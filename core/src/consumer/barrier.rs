//! Forward calls and compensations that meet in any order, any number of times, and still have their effect once.

use super::Context;
use crate::{
    Error, ErrorKind, EventLog, GroupName, MessageId, Result,
    event::JsonError,
    log::{Lent, TransactionOf},
};
use serde::{Deserialize, Serialize};

/// Guards a step whose effects are in a transaction on the log's database against the three accidents of compensation:
///
/// - **twice**: a forward call or a compensation that is repeated has its effect once;
/// - **empty compensation**: one that arrives without its forward call has no effect;
/// - **hanging**: it is remembered, and the forward call that arrives late is refused.
///
/// Ask it first in the transaction that holds the step's effects, and do nothing if it says so:
///
/// ```ignore
/// async fn charge(order: &OrderPlaced, ctx: &mut Context) -> HandlerResult {
///     if ctx.barrier("charge").await?.forward(ctx.transaction()?).await? {
///         // the effects, with ctx.tx()
///     }
///     Ok(())
/// }
/// ```
///
/// Attempts are told apart by a counter kept with that state, never by a clock: the first barrier of an attempt reads it.
/// The state is a small note in the group's inbox, kept as long as receipts are. The name and the accidents are those of
/// the `dtm` project's sub-transaction barrier.
#[derive(Debug, Clone)]
pub struct Barrier {
    log: Option<EventLog>,
    group: GroupName,
    id: MessageId,
    round: u64,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct State {
    /// The round of the last call that counted: attempts in which one did.
    round: u64,
    is_done: bool,
}

/// How often a state is read again that somebody else has changed meanwhile.
const TRIES: usize = 10;

/// Rounds of durable chains, which count their beginnings themselves, are above all others: of the two, a chain that has become
/// durable, or is so no longer, is the later one.
const DURABLE: u64 = 1 << 40;

impl Context {
    /// The barrier of a step: of this message, this group and the name given. Ask for it before the effects: what comes later
    /// than its attempt is told by when it was asked for.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without a log that has an inbox; otherwise of the log.
    pub async fn barrier(&mut self, step: &str) -> Result<Barrier> {
        let tools = self.tools();
        let mut barrier = Barrier {
            log: tools.log.clone(),
            group: tools.group.clone(),
            id: MessageId::foreign(&format!("barrier of {step}"), &self.message().id().to_string()),
            round: 0,
        };
        barrier.round = match (self.beginnings, self.rounds.get(step)) {
            (_, Some(round)) => *round,
            (Some(beginnings), None) => DURABLE + beginnings,
            (None, None) => {
                let tx = self.lent().as_mut().map(TransactionOf::lend_connection);
                let (_, last) = barrier.read(tx).await?;
                last.map_or(0, |last| last.round) + 1
            }
        };
        self.rounds.insert(step.to_owned(), barrier.round);
        Ok(barrier)
    }
}

impl Barrier {
    /// Whether the forward call is to have its effect: `false` if it has had it already.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if it comes too late: it has been compensated already. [`ErrorKind::WrongTransaction`] if the
    /// transaction is of another database than the log; [`ErrorKind::Unsupported`] without an inbox.
    pub async fn forward<L: ?Sized, T: TransactionOf<L> + ?Sized>(&self, tx: &mut T) -> Result<bool> {
        for _ in 0..TRIES {
            let (version, state) = self.read(Some(tx.lend_connection())).await?;
            match state {
                Some(State { is_done: true, .. }) => return Ok(false),
                Some(State { round, .. }) if round >= self.round => {
                    let text = "the forward call comes too late: it has been compensated already";
                    return Err(Error::new(ErrorKind::Conflict, text).with("group", &self.group));
                }
                _ if self.write(tx.lend_connection(), version, true, self.round).await? => return Ok(true),
                _ => {}
            }
        }
        Err(self.contended())
    }

    /// Whether the compensation is to have its effect: `false` if there is nothing to take back, which is remembered.
    ///
    /// # Errors
    /// As [`forward`](Barrier::forward), but for `Conflict`.
    pub async fn compensate<L: ?Sized, T: TransactionOf<L> + ?Sized>(&self, tx: &mut T) -> Result<bool> {
        for _ in 0..TRIES {
            let (version, state) = self.read(Some(tx.lend_connection())).await?;
            let (has_effect, round) = match state {
                Some(State { is_done: true, round }) => (true, round.max(self.round)),
                Some(State { round, .. }) if round >= self.round => return Ok(false),
                _ => (false, self.round),
            };
            if self.write(tx.lend_connection(), version, false, round).await? {
                return Ok(has_effect);
            }
        }
        Err(self.contended())
    }

    async fn read(&self, tx: Option<Lent<'_>>) -> Result<(u64, Option<State>)> {
        let note = self.log()?.inbox()?.note(tx, &self.group, self.id).await?;
        let Some(note) = note else { return Ok((0, None)) };
        let state = serde_json::from_str(&note.text).map_err(|e| {
            Error::new(ErrorKind::Storage, "the state of a barrier cannot be read").because(JsonError::from(e))
        })?;
        Ok((note.version, Some(state)))
    }

    async fn write(&self, tx: Lent<'_>, version: u64, is_done: bool, round: u64) -> Result<bool> {
        let text = serde_json::to_string(&State { round, is_done }).map_err(|e| {
            Error::new(ErrorKind::Unexpected, "the state of a barrier cannot be written").because(JsonError::from(e))
        })?;
        let inbox = self.log()?.inbox()?;
        inbox.write_note(Some(tx), &self.group, self.id, version, &text).await
    }

    fn log(&self) -> Result<&EventLog> {
        self.log.as_ref().ok_or_else(|| {
            let text = "a barrier keeps its state in the event log, and this bus has none";
            Error::new(ErrorKind::Unsupported, text)
        })
    }

    fn contended(&self) -> Error {
        Error::new(ErrorKind::Conflict, "the state of a barrier keeps changing").with("group", &self.group)
    }
}
