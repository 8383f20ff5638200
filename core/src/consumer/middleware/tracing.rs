use super::{Context, HandlerResult, Middleware, Next};
use tracing::Instrument as _;

/// A span around each attempt, with the attributes of OpenTelemetry's messaging conventions: operation, destination,
/// group, message id, attempt, and the message's `traceparent` for a layer that joins traces. Failures are recorded on it
/// at `warn`.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Tracing;

impl Tracing {
    /// Spans called `process`.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl<E: Sync + 'static> Middleware<E> for Tracing {
    async fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> HandlerResult {
        let message = ctx.message();
        // As an attribute of the event, or as a plain header.
        let traceparent = message.attribute("traceparent").map(|value| value.as_text());
        let traceparent = traceparent.or_else(|| message.header("traceparent").map(Into::into));
        let span = tracing::info_span!(
            "process",
            otel.kind = "consumer",
            messaging.operation.type = "process",
            messaging.destination.name = %message.topic(),
            messaging.consumer.group.name = %ctx.group(),
            messaging.message.id = %message.event_id(),
            messaging.message.type = message.kind(),
            messaging.message.body.size = message.payload().len(),
            postrider.attempt = ctx.attempt(),
            traceparent = traceparent.as_deref(),
            correlationid = message.attribute("correlationid").map(tracing::field::display),
            error.message = tracing::field::Empty,
        );
        async {
            let result = next.run(ctx, event).await;
            if let Err(error) = &result {
                let text = error.to_chain();
                tracing::Span::current().record("error.message", text.as_str());
                tracing::warn!(error = text, kind = ?error.kind(), "the attempt failed");
            }
            result
        }
        .instrument(span)
        .await
    }
}
