//! Chains that survive the death of their process in the middle: all done, or all taken back.
//!
//! The message is taken into the inbox first and handled from there, under the inbox's lease, by whichever process has it.
//! What has been done is written down beside it, compared and set, so a process that lost its lease writes nothing:
//!
//! 1. before a step, that it begins; 2. the step, in a transaction of its own; 3. in that transaction, that it is done.
//!
//! Whoever takes over after a crash goes on behind the last step that is done. A step that had begun and is not done is in
//! doubt: it is compensated, and those before it, and the chain begins anew. Saga logs work so (Garcia-Molina and Salem,
//! "Sagas", 1987).

use super::{
    Context, HandlerError, HandlerErrorKind, HandlerResult, OnFailure,
    chain::{Step, Steps},
};
use crate::{
    ErrorKind,
    log::{AnyLog, InboxLog, Note, TransactionOf},
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// How far a chain has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    /// The chain's steps, to tell when another version of the program has others.
    steps: String,
    /// Counts the beginnings.
    round: u64,
    #[serde(flatten)]
    phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
enum Phase {
    /// Forwards: `next` is the step to come, `began` whether it has begun, `ran` those to be taken back if it fails.
    Forward { next: usize, began: bool, ran: Vec<usize> },
    /// Backwards: `left` are still to be taken back, the last one first; `stuck` could not be.
    Back {
        left: Vec<usize>,
        stuck: Vec<usize>,
        why: String,
        is_permanent: bool,
    },
    /// All done.
    Done,
}

/// One run of a chain: from where the note says it is.
struct Run<'a, E> {
    steps: &'a Steps<E>,
    inbox: Arc<dyn InboxLog>,
    version: u64,
    progress: Progress,
}

pub(super) async fn run<E: Sync + 'static>(steps: &Steps<E>, ctx: &mut Context, event: &E) -> HandlerResult {
    let names: Vec<&str> = steps.steps.iter().map(|step| &*step.name).collect();
    let names = names.join(" → ");
    let log = ctx.tools().log.clone();
    let inbox = log.as_ref().map(|log| log.inbox().cloned());
    let Some(Ok(inbox)) = inbox else {
        return Err(HandlerError::permanent(
            "a durable chain needs an event log with an inbox",
        ));
    };
    let group = ctx.group().clone();
    let note = inbox.note(None, &group, ctx.message().id()).await?;
    let version = note.as_ref().map_or(0, |note| note.version);
    let progress = match note {
        Some(Note { text, .. }) => serde_json::from_str(&text)
            .map_err(|error| HandlerError::permanent(format!("what was noted of the chain cannot be read: {error}")))?,
        None => Progress {
            steps: names.clone(),
            round: 1,
            phase: Phase::Forward {
                next: 0,
                began: false,
                ran: Vec::new(),
            },
        },
    };
    if progress.steps != names && progress.phase != Phase::Done {
        let text = format!(
            "the steps of the chain have changed while it was under way: from {} to {names}",
            progress.steps
        );
        return Err(HandlerError::permanent(text));
    }
    let mut run = Run {
        steps,
        inbox,
        version,
        progress,
    };
    run.go_on(ctx, event).await
}

impl<E: Sync + 'static> Run<'_, E> {
    async fn go_on(&mut self, ctx: &mut Context, event: &E) -> HandlerResult {
        loop {
            ctx.set_round(self.progress.round);
            match self.progress.phase.clone() {
                Phase::Done => return Ok(()),
                Phase::Forward {
                    next,
                    began: true,
                    mut ran,
                } => {
                    // Nobody knows whether it has happened: it is taken back, and the attempt counts, for it may be this
                    // message that ends processes.
                    ran.push(next);
                    let name = self.steps.steps.get(next).map_or("?", |step| &step.name);
                    let why = format!("the process ended in the step {name}");
                    self.turn_back(ctx, ran, why, false).await?;
                }
                Phase::Forward { next, ran, .. } if next == self.steps.steps.len() => {
                    drop(ran);
                    self.note(ctx, Phase::Done).await?;
                }
                Phase::Forward { next, ran, .. } => self.step_forward(ctx, event, next, ran).await?,
                Phase::Back {
                    left,
                    stuck,
                    why,
                    is_permanent,
                } => match left.split_last() {
                    Some((at, left)) => self.step_back(ctx, event, *at, left, stuck, why, is_permanent).await?,
                    None => return self.taken_back(ctx, stuck, why, is_permanent).await,
                },
            }
        }
    }

    async fn step_forward(&mut self, ctx: &mut Context, event: &E, next: usize, ran: Vec<usize>) -> HandlerResult {
        let steps = self.steps;
        let step = &steps.steps[next];
        let forward = |next, began, ran: &Vec<usize>| Phase::Forward {
            next,
            began,
            ran: ran.clone(),
        };
        self.note(ctx, forward(next, true, &ran)).await?;
        let result = self.in_transaction(ctx, event, step, false, || {
            let mut ran = ran.clone();
            ran.push(next);
            forward(next + 1, false, &ran)
        });
        let Err(error) = result.await else { return Ok(()) };
        if error.kind() == HandlerErrorKind::Unavailable {
            // Nothing has happened, as far as the step knows: it is tried again from here when the service is back.
            self.refresh(ctx).await?;
            if let Phase::Forward { began: true, .. } = self.progress.phase {
                self.note(ctx, forward(next, false, &ran)).await?;
            }
            return Err(error);
        }
        let mut back = ran;
        match step.on_failure {
            OnFailure::Ignore => {
                tracing::warn!(message = %ctx.message().id(), group = %ctx.group(), step = %step.name, error = error.to_chain(), "a step failed that may: the chain goes on");
                return self.note(ctx, forward(next + 1, false, &back)).await;
            }
            OnFailure::StopAndCompensateSelf => back.push(next),
            OnFailure::Stop => {}
        }
        let is_permanent = error.kind() == HandlerErrorKind::Permanent;
        self.turn_back(ctx, back, error.to_chain(), is_permanent).await
    }

    #[allow(clippy::too_many_arguments)] // the parts of one phase
    async fn step_back(
        &mut self,
        ctx: &mut Context,
        event: &E,
        at: usize,
        left: &[usize],
        stuck: Vec<usize>,
        why: String,
        is_permanent: bool,
    ) -> HandlerResult {
        let steps = self.steps;
        let back = |stuck: &[usize], why: String| Phase::Back {
            left: left.to_vec(),
            stuck: stuck.to_vec(),
            why,
            is_permanent,
        };
        let Some(step) = steps.steps.get(at).filter(|step| step.compensate.is_some()) else {
            return self.note(ctx, back(&stuck, why)).await;
        };
        let result = self.in_transaction(ctx, event, step, true, || back(&stuck, why.clone()));
        match result.await {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == HandlerErrorKind::Unavailable => Err(error),
            Err(error) => {
                let text = error.to_chain();
                tracing::error!(message = %ctx.message().id(), group = %ctx.group(), step = %step.name, error = text, "a compensation failed; the others run all the same");
                let mut stuck = stuck.clone();
                stuck.push(at);
                let why = format!("{why}; beside it the compensation of {} failed: {text}", step.name);
                self.note(ctx, back(&stuck, why)).await
            }
        }
    }

    /// All that could be taken back has been. The attempt has failed; what is stuck is for a person, whose redrive tries
    /// it again.
    async fn taken_back(
        &mut self,
        ctx: &mut Context,
        stuck: Vec<usize>,
        why: String,
        is_permanent: bool,
    ) -> HandlerResult {
        if stuck.is_empty() {
            self.progress.round += 1;
            let again = Phase::Forward {
                next: 0,
                began: false,
                ran: Vec::new(),
            };
            self.note(ctx, again).await?;
            return Err(match is_permanent {
                true => HandlerError::permanent(why),
                false => HandlerError::transient(why),
            });
        }
        let left = stuck.into_iter().rev().collect();
        let again = Phase::Back {
            left,
            stuck: Vec::new(),
            why: why.clone(),
            is_permanent,
        };
        self.note(ctx, again).await?;
        Err(HandlerError::permanent(why))
    }

    async fn turn_back(
        &mut self,
        ctx: &mut Context,
        left: Vec<usize>,
        why: String,
        is_permanent: bool,
    ) -> HandlerResult {
        let back = Phase::Back {
            left,
            stuck: Vec::new(),
            why,
            is_permanent,
        };
        self.note(ctx, back).await
    }

    /// Runs a step or its compensation in a transaction that also writes how far the chain is then.
    async fn in_transaction(
        &mut self,
        ctx: &mut Context,
        event: &E,
        step: &Step<E>,
        back: bool,
        then: impl FnOnce() -> Phase + Send,
    ) -> HandlerResult {
        let tx = ctx.bus().begin().await?;
        ctx.lend(tx);
        let run = match (&step.compensate, back) {
            (Some(compensation), true) => &**compensation,
            _ => &*step.run,
        };
        if let Err(error) = step.guarded(run, event, ctx).await {
            ctx.roll_back().await;
            return Err(error);
        }
        let Some(mut tx) = ctx.take_transaction() else {
            return Err("the step took the transaction of its chain away".into());
        };
        let progress = Progress {
            phase: then(),
            ..self.progress.clone()
        };
        let text = text(&progress)?;
        let (group, id) = (ctx.group().clone(), ctx.message().id());
        let written = self
            .inbox
            .write_note(
                Some(TransactionOf::<AnyLog>::lend_connection(&mut tx)),
                &group,
                id,
                self.version,
                &text,
            )
            .await;
        // An error here may be of a statement of the step that was swallowed: then it is the step's.
        if !written.map_err(HandlerError::transient)? {
            return Err(taken_over());
        }
        match tx.commit().await {
            Ok(()) => {
                self.version += 1;
                self.progress = progress;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Unavailable => {
                // The note tells whether it was committed.
                self.refresh(ctx).await?;
                if self.progress == progress {
                    Ok(())
                } else {
                    Err(error.into())
                }
            }
            Err(error) => Err(HandlerError::transient(error)),
        }
    }

    async fn note(&mut self, ctx: &Context, phase: Phase) -> HandlerResult {
        self.progress.phase = phase;
        let text = text(&self.progress)?;
        let id = ctx.message().id();
        if !self
            .inbox
            .write_note(None, ctx.group(), id, self.version, &text)
            .await?
        {
            return Err(taken_over());
        }
        self.version += 1;
        Ok(())
    }

    /// Reads what is noted, after an answer that did not come.
    async fn refresh(&mut self, ctx: &Context) -> HandlerResult {
        let note = self.inbox.note(None, ctx.group(), ctx.message().id()).await?;
        if let Some(note) = note {
            self.version = note.version;
            self.progress = serde_json::from_str(&note.text).map_err(HandlerError::permanent)?;
        }
        Ok(())
    }
}

fn text(progress: &Progress) -> Result<String, HandlerError> {
    serde_json::to_string(progress).map_err(HandlerError::permanent)
}

/// Somebody else goes on with it: this process had lost the lease.
fn taken_over() -> HandlerError {
    HandlerError::taken_over()
}
