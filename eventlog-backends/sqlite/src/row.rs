//! Rows and what they mean.

use postrider_core::{
    Error, ErrorKind, Message, MessageId, MessageParts, Result, Topic, clock::Timestamp, log::AttemptError,
    message::Text,
};
use sqlx::{Row as _, sqlite::SqliteRow};
use std::sync::Arc;
use uuid::Uuid;

pub(crate) fn micros(time: Timestamp) -> i64 {
    time.timestamp_micros()
}

pub(crate) fn time(micros: i64) -> Timestamp {
    Timestamp::from_timestamp_micros(micros).unwrap_or_default()
}

/// Reads messages, and shares what their rows have in common: a backlog has few topics, types and sources.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    topic: Option<Topic>,
    kind: Option<Text>,
    source: Option<Text>,
    content_type: Option<Text>,
}

fn shared(last: &mut Option<Text>, text: &str) -> Text {
    match last {
        Some(last) if last.as_str() == text => last.clone(),
        _ => last.insert(Text::from(Arc::<str>::from(text))).clone(),
    }
}

impl Reader {
    /// The message in the columns from `first` on.
    pub(crate) fn message(&mut self, row: &SqliteRow, first: usize) -> Result<Message> {
        self.read(row, first).map_err(|error| {
            let id: i64 = row.try_get(first.saturating_sub(1)).unwrap_or_default();
            Error::new(
                ErrorKind::Storage,
                "a row of the event log cannot be read: was it written by something else?",
            )
            .with("id", id)
            .because(error)
        })
    }

    fn read(
        &mut self,
        row: &SqliteRow,
        first: usize,
    ) -> std::result::Result<Message, Box<dyn std::error::Error + Send + Sync>> {
        let id: &[u8] = row.try_get(first)?;
        let topic: &str = row.try_get(first + 1)?;
        let topic = match &self.topic {
            Some(last) if last.as_str() == topic => last.clone(),
            _ => self.topic.insert(Topic::parse(topic.to_owned())?).clone(),
        };
        let kind: &str = row.try_get(first + 2)?;
        let source: Option<&str> = row.try_get(first + 3)?;
        let key: Option<&str> = row.try_get(first + 4)?;
        let content_type: &str = row.try_get(first + 5)?;
        let headers: &str = row.try_get(first + 6)?;
        let time_of: Option<i64> = row.try_get(first + 7)?;
        let payload: &[u8] = row.try_get(first + 8)?;
        Ok(Message::from(MessageParts {
            id: MessageId::from_uuid(Uuid::from_slice(id)?),
            kind: shared(&mut self.kind, kind),
            source: source.map(|source| shared(&mut self.source, source)),
            topic,
            key: key.map(Into::into),
            headers: if headers == "[]" {
                Vec::new()
            } else {
                serde_json::from_str(headers)?
            },
            content_type: shared(&mut self.content_type, content_type),
            time: time_of.map(time),
            payload: payload.to_vec().into(),
        }))
    }
}

/// The headers as they are stored.
pub(crate) fn headers(message: &Message) -> Result<String> {
    if message.headers().is_empty() {
        return Ok("[]".to_owned());
    }
    serde_json::to_string(message.headers())
        .map_err(|e| Error::new(ErrorKind::Invalid, "the headers cannot be stored").because(e))
}

pub(crate) fn errors_to_text(errors: &[AttemptError]) -> Result<String> {
    serde_json::to_string(errors)
        .map_err(|e| Error::new(ErrorKind::Unexpected, "the errors of a record cannot be stored").because(e))
}

/// The errors kept; a text that is none counts as no errors, since nothing depends on them.
pub(crate) fn errors_from_text(text: &str) -> Vec<AttemptError> {
    serde_json::from_str(text).unwrap_or_default()
}

/// Ids as the statements take them.
pub(crate) fn ids(ids: impl IntoIterator<Item = i64>) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("[");
    for (n, id) in ids.into_iter().enumerate() {
        let separator = if n == 0 { "" } else { "," };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{id}");
    }
    text.push(']');
    text
}
