use super::RelayOptions;
use crate::{
    Mailbox,
    clock::Clock,
    log::{EventLogStore, Purge},
};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Removes what is past its retention from a mailbox, and receipts of this age, in bounded steps, every `cleanup_interval` until `stop`.
pub(crate) async fn clean_up(
    store: Arc<dyn EventLogStore>,
    mailbox: Mailbox,
    options: Arc<RelayOptions>,
    receipts: Option<Duration>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let mut request = Purge::new(mailbox, options.cleanup_batch).succeeded_after(options.retention);
    if let Some(age) = options.failed_retention {
        request = request.failed_after(age);
    }
    if let Some(age) = receipts {
        request = request.receipts_after(age);
    }
    let run = async {
        loop {
            clock.sleep(options.cleanup_interval).await;
            loop {
                match store.purge(&request).await {
                    Ok(removed) if removed >= options.cleanup_batch => tokio::task::yield_now().await,
                    Ok(_) => break,
                    Err(error) => {
                        tracing::warn!(error = error.to_chain(), mailbox = %request.mailbox, "the clean-up failed, it will be tried again");
                        break;
                    }
                }
            }
        }
    };
    stop.run_until_cancelled(run).await;
}
