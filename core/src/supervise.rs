//! The guard around every task of a bus: what dies is logged, shown in the bus's health, and restarted where that is safe.

use crate::{
    clock::Clock,
    health::{PartState, Status, Trouble},
};
use futures_util::FutureExt as _;
use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// The first wait before a restart; it doubles.
const FIRST: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST: Duration = Duration::from_secs(60);
/// A part that has lived for so long is sound again.
const SOUND: Duration = Duration::from_secs(30);
/// A part that has died so often in a row has failed, though it is still being restarted.
const FAILED: u32 = 5;

/// How a run of a part ended.
pub(crate) enum Next {
    /// For good.
    Ended,
    /// It is to be run again, after this long.
    Again(Duration),
}

/// Runs a part until it ends by itself, or `stop`; restarts it when it panics.
pub(crate) async fn supervise<Fut>(
    status: Arc<Status>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
    mut run: impl FnMut() -> Fut + Send,
) where
    Fut: Future<Output = Next> + Send,
{
    let mut deaths: u32 = 0;
    loop {
        let began = clock.elapsed();
        let mut life = std::pin::pin!(AssertUnwindSafe(async { run().await }).catch_unwind());
        let ended = if deaths == 0 {
            life.await
        } else {
            tokio::select! {
                biased;
                ended = &mut life => ended,
                () = clock.sleep(SOUND) => {
                    status.clear(Trouble::Crash);
                    life.await
                }
            }
        };
        if clock.elapsed().saturating_sub(began) >= SOUND {
            deaths = 0;
        }
        let wait = match ended {
            Ok(Next::Ended) => break,
            Ok(Next::Again(wait)) => wait,
            Err(panic) => {
                deaths = deaths.saturating_add(1);
                let wait = FIRST.saturating_mul(1 << (deaths - 1).min(10)).min(LONGEST);
                died(&status, &*panic, Some(wait), deaths);
                wait
            }
        };
        if stop.run_until_cancelled(clock.sleep(wait)).await.is_none() {
            break;
        }
    }
    status.is(PartState::Stopped);
}

/// Runs a part that cannot be run twice. `None` if it panicked.
pub(crate) async fn once<T>(status: &Status, run: impl Future<Output = T>) -> Option<T> {
    match AssertUnwindSafe(run).catch_unwind().await {
        Ok(value) => Some(value),
        Err(panic) => {
            died(status, &*panic, None, FAILED);
            None
        }
    }
}

fn died(status: &Status, panic: &(dyn Any + Send), restart_in: Option<Duration>, deaths: u32) {
    let text = crate::error::panic_text(panic);
    let what = match restart_in {
        Some(_) => "a part of the bus panicked: it is restarted",
        None => "a part of the bus panicked: it does not run any more",
    };
    tracing::error!(part = %status.part(), panic = text, ?restart_in, deaths, "{what}");
    let state = match deaths >= FAILED {
        true => PartState::Failed,
        false => PartState::Degraded,
    };
    let fix = "a panic is a defect: of the log, the transport or a task of the application, as its text and place say";
    status.raise(Trouble::Crash, state, format!("it panicked: {text}"), Some(fix));
}
