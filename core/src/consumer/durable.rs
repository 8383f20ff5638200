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
    context::Author,
    error::is_outage,
    steps::{Step, Steps},
};
use crate::{
    event::JsonError,
    log::{AnyLog, InboxLog, Note, TransactionOf},
};
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};

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
    /// Backwards.
    Back(Back),
    /// All done.
    Done,
}

/// A way back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Back {
    /// Still to be taken back, the last one first.
    left: Vec<usize>,
    /// Could not be.
    stuck: Vec<usize>,
    why: String,
    is_permanent: bool,
    /// How long to wait before the next round, where the step knew.
    after_ms: Option<u64>,
    /// `left` are those that could not be taken back the time before.
    is_again: bool,
}

const BEGINNING: Phase = Phase::Forward {
    next: 0,
    began: false,
    ran: Vec::new(),
};

/// One run of a chain: from where the note says it is.
struct Run<'a, E> {
    steps: &'a Steps<E>,
    inbox: Arc<dyn InboxLog>,
    version: u64,
    progress: Progress,
}

pub(super) async fn run<E: Sync + 'static>(steps: &Steps<E>, ctx: &mut Context, event: &E) -> HandlerResult {
    let names = names(steps);
    let log = ctx.tools().log.clone();
    let inbox = log.as_ref().map(|log| log.inbox().cloned());
    let Some(Ok(inbox)) = inbox else {
        return Err(HandlerError::permanent(
            "a durable chain needs an event log with an inbox",
        ));
    };
    let group = ctx.group().clone();
    let note = inbox.note(None, &group, ctx.message().id()).await;
    let note = note.map_err(HandlerError::of_the_log)?;
    still_held(ctx)?;
    let version = note.as_ref().map_or(0, |note| note.version);
    let progress = match note {
        Some(Note { text, .. }) => serde_json::from_str(&text)
            .map_err(JsonError::from)
            .map_err(|error| HandlerError::permanent(format!("what was noted of the chain cannot be read: {error}")))?,
        None => Progress {
            steps: names.clone(),
            round: 1,
            phase: BEGINNING,
        },
    };
    let mut progress: Progress = progress;
    if progress.phase == BEGINNING {
        // Nothing is in effect: another version of the program may have other steps.
        progress.steps.clone_from(&names);
    }
    if let Phase::Forward { began, .. } = &mut progress.phase
        && ctx.rolled_back == Some(version)
    {
        // It was this process that began it, and rolled it back.
        *began = false;
    }
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
            ctx.beginnings = Some(self.progress.round);
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
                    let why = format!("it was cut off, or the process ended, in the step {name}");
                    let back = Back {
                        left: ran,
                        why,
                        ..Back::default()
                    };
                    self.note(ctx, Phase::Back(back)).await?;
                }
                Phase::Forward { next, .. } if next == self.steps.steps.len() => self.note(ctx, Phase::Done).await?,
                Phase::Forward { next, ran, .. } => self.step_forward(ctx, event, next, ran).await?,
                Phase::Back(mut back) => match back.left.pop() {
                    Some(at) => self.step_back(ctx, event, at, back).await?,
                    None => return self.taken_back(ctx, back).await,
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
        if let Err(error) = self.note(ctx, forward(next, true, &ran)).await {
            // Should it be written all the same: it was this process, and the step has not begun.
            ctx.rolled_back = Some(self.version + 1);
            return Err(error);
        }
        ctx.publishes_as(Author::step(next, self.progress.round));
        let result = self.in_transaction(ctx, event, step, false, || {
            let mut ran = ran.clone();
            ran.push(next);
            forward(next + 1, false, &ran)
        });
        let Err(error) = result.await else { return Ok(()) };
        if error.kind() == HandlerErrorKind::Unavailable {
            // Nothing has happened, as far as the step knows: it is tried again from here when the service is back. Should
            // that be the log itself, it is remembered here that nothing has.
            ctx.rolled_back = Some(self.version);
            self.refresh(ctx).await?;
            if let Phase::Forward { began: true, .. } = self.progress.phase {
                self.note(ctx, forward(next, false, &ran)).await?;
            }
            return Err(error);
        }
        let mut left = ran;
        match step.on_failure {
            OnFailure::Ignore => {
                tracing::warn!(message = %ctx.message().id(), group = %ctx.group(), step = %step.name, error = error.to_chain(), "a step failed that may: the chain goes on");
                return self.note(ctx, forward(next + 1, false, &left)).await;
            }
            OnFailure::StopAndCompensateSelf => left.push(next),
            OnFailure::Stop => {}
        }
        let after_ms = match error.kind() {
            HandlerErrorKind::RetryAfter(wait) => Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            _ => None,
        };
        let back = Back {
            left,
            why: error.to_chain(),
            is_permanent: error.kind() == HandlerErrorKind::Permanent,
            after_ms,
            ..Back::default()
        };
        self.note(ctx, Phase::Back(back)).await
    }

    /// Takes the step at `at` back; `back` is what is left then.
    async fn step_back(&mut self, ctx: &mut Context, event: &E, at: usize, mut back: Back) -> HandlerResult {
        let steps = self.steps;
        let Some(step) = steps.steps.get(at).filter(|step| step.compensate.is_some()) else {
            return self.note(ctx, Phase::Back(back)).await;
        };
        ctx.publishes_as(Author::compensation(at, self.progress.round));
        let result = self.in_transaction(ctx, event, step, true, || Phase::Back(back.clone()));
        match result.await {
            Ok(()) => Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    HandlerErrorKind::Unavailable | HandlerErrorKind::TakenOver
                ) =>
            {
                Err(error)
            }
            Err(error) => {
                let text = error.to_chain();
                tracing::error!(message = %ctx.message().id(), group = %ctx.group(), step = %step.name, error = text, "a compensation failed; the others run all the same");
                back.stuck.push(at);
                back.why = format!(
                    "{}; beside it the compensation of {} failed: {text}",
                    back.why, step.name
                );
                self.note(ctx, Phase::Back(back)).await
            }
        }
    }

    /// All that could be taken back has been, and the attempt has failed. What is stuck is tried again with the next one, and
    /// after the last by a person's redrive.
    async fn taken_back(&mut self, ctx: &mut Context, back: Back) -> HandlerResult {
        let error = match (back.is_permanent, back.after_ms) {
            (true, _) => HandlerError::permanent(back.why.clone()),
            (false, Some(wait)) => HandlerError::retry_after(Duration::from_millis(wait), back.why.clone()),
            (false, None) => HandlerError::transient(back.why.clone()),
        };
        if back.stuck.is_empty() {
            self.progress.round += 1;
            self.note(ctx, BEGINNING).await?;
        } else {
            let mut left = back.stuck.clone();
            left.reverse();
            let again = Back {
                left,
                stuck: Vec::new(),
                is_again: true,
                ..back
            };
            self.note(ctx, Phase::Back(again)).await?;
        }
        Err(error)
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
        let tx = ctx.bus().begin().await.map_err(HandlerError::of_the_log)?;
        ctx.lend(tx);
        let run = match (&step.compensate, back) {
            (Some(compensation), true) => &**compensation,
            _ => &*step.run,
        };
        let bus = ctx.bus().clone();
        if let Err(error) = bus.in_transaction(step.guarded(run, event, ctx)).await {
            let error = ctx.rolled_back_after(error).await;
            return Err(ctx.judged(error));
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
        let written = written.map_err(|error| match is_outage(&error) {
            true => HandlerError::unavailable(error),
            false => HandlerError::transient(error),
        });
        if !written? {
            return Err(HandlerError::taken_over());
        }
        match tx.commit().await {
            Ok(()) => {
                self.version += 1;
                self.progress = progress;
                Ok(())
            }
            Err(error) if is_outage(&error) => {
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
            .await
            .map_err(HandlerError::of_the_log)?
        {
            return Err(HandlerError::taken_over());
        }
        self.version += 1;
        Ok(())
    }

    /// Reads what is noted, after an answer that did not come.
    async fn refresh(&mut self, ctx: &Context) -> HandlerResult {
        let note = self.inbox.note(None, ctx.group(), ctx.message().id()).await;
        let note = note.map_err(HandlerError::of_the_log)?;
        still_held(ctx)?;
        if let Some(note) = note {
            self.version = note.version;
            let progress = serde_json::from_str(&note.text).map_err(JsonError::from);
            self.progress = progress.map_err(HandlerError::permanent)?;
        }
        Ok(())
    }
}

/// Asked after each read of the note: whoever takes the message over writes it, so from a note that was read under the lease
/// nothing can be written after that was lost. One read later may be the other's last word.
fn still_held(ctx: &Context) -> HandlerResult {
    match &ctx.lease {
        Some(lease) if !lease.is_held() => Err(HandlerError::taken_over()),
        _ => Ok(()),
    }
}

fn names<E>(steps: &Steps<E>) -> String {
    let names: Vec<&str> = steps.steps.iter().map(|step| &*step.name).collect();
    names.join(" → ")
}

fn text(progress: &Progress) -> Result<String, HandlerError> {
    serde_json::to_string(progress).map_err(|error| HandlerError::permanent(JsonError::from(error)))
}

/// Whether this program leaves the chain of the message as it is: done, taken back as far as that goes, or one that has
/// other steps.
pub(super) async fn is_settled<E>(steps: &Steps<E>, ctx: &Context) -> bool {
    let Some(Ok(inbox)) = ctx.tools().log.as_ref().map(|log| log.inbox()) else {
        return true;
    };
    let note = match inbox.note(None, ctx.group(), ctx.message().id()).await {
        Ok(Some(note)) => note,
        Ok(None) => return true,
        // It is asked again with the next attempt.
        Err(_) => return false,
    };
    let Ok(progress) = serde_json::from_str::<Progress>(&note.text) else {
        return true;
    };
    match progress.phase {
        Phase::Done => true,
        _ if progress.steps != names(steps) => true,
        Phase::Back(back) => back.is_again,
        phase => phase == BEGINNING,
    }
}
