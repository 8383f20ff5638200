//! Rows and what they mean.

use bytes::Bytes;
use postrider_core::{
    Error, ErrorKind, Message, MessageId, MessageParts, Result, Topic,
    clock::Timestamp,
    event::JsonError,
    log::{AttemptError, Headers},
    message::Text,
};
use sqlx::{Row as _, sqlite::SqliteRow};
use std::{borrow::Cow, sync::Arc};
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

/// An event as the claims read it: see `fresh`.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Packed<'a>(
    pub(crate) i64,
    /// Whether something of its key is parked.
    pub(crate) u8,
    /// The message id, in hexadecimal.
    #[serde(borrow)]
    Cow<'a, str>,
    #[serde(borrow)] Cow<'a, str>,
    #[serde(borrow)] Cow<'a, str>,
    #[serde(borrow)] Option<Cow<'a, str>>,
    #[serde(borrow)] Option<Cow<'a, str>>,
    #[serde(borrow)] Cow<'a, str>,
    #[serde(borrow)] Cow<'a, str>,
    Option<i64>,
    /// How long the payload is.
    usize,
);

impl Packed<'_> {
    pub(crate) fn topic_and_key(&self) -> Option<(String, String)> {
        Some((self.3.clone().into_owned(), self.6.clone()?.into_owned()))
    }
}

/// The events of one row of `fresh`, each with its payload.
pub(crate) fn unpack(text: &str, payloads: Vec<u8>) -> Result<Vec<(Packed<'_>, Bytes)>> {
    let packed: Vec<Packed<'_>> = serde_json::from_str(text).map_err(|e| unreadable().because(JsonError::from(e)))?;
    let mut payloads = Bytes::from(payloads);
    let lengths: usize = packed.iter().map(|event| event.10).sum();
    if lengths != payloads.len() {
        return Err(unreadable()
            .with("payload bytes", payloads.len())
            .with("expected", lengths));
    }
    let cut = |event| {
        let event: Packed<'_> = event;
        let payload = payloads.split_to(event.10);
        (event, payload)
    };
    Ok(packed.into_iter().map(cut).collect())
}

fn unreadable() -> Error {
    Error::new(
        ErrorKind::Storage,
        "a row of the event log cannot be read: was it written by something else?",
    )
}

impl Reader {
    /// The message of an event.
    pub(crate) fn packed(&mut self, event: &Packed<'_>, payload: Bytes) -> Result<Message> {
        self.read_packed(event, payload)
            .map_err(|error| unreadable().with("id", event.0).because(error))
    }

    fn read_packed(
        &mut self,
        event: &Packed<'_>,
        payload: Bytes,
    ) -> std::result::Result<Message, Box<dyn std::error::Error + Send + Sync>> {
        let Packed(_, _, id, topic, kind, source, key, content_type, headers, at, _) = event;
        let Headers {
            event_id,
            attributes,
            headers,
            ..
        } = Headers::from_text(headers)?;
        Ok(Message::from(MessageParts {
            id: MessageId::from_uuid(Uuid::try_parse_ascii(id.as_bytes())?),
            event_id,
            kind: shared(&mut self.kind, kind),
            source: source.as_deref().map(|source| shared(&mut self.source, source)),
            topic: self.topic(topic)?,
            key: key.as_deref().map(Into::into),
            attributes,
            headers,
            content_type: shared(&mut self.content_type, content_type),
            time: at.map(time),
            payload,
        }))
    }

    fn topic(&mut self, topic: &str) -> Result<Topic> {
        match &self.topic {
            Some(last) if last.as_str() == topic => Ok(last.clone()),
            _ => Ok(self.topic.insert(Topic::parse(topic.to_owned())?).clone()),
        }
    }

    /// The message in the columns from `first` on.
    pub(crate) fn message(&mut self, row: &SqliteRow, first: usize) -> Result<Message> {
        self.read(row, first).map_err(|error| {
            let id: i64 = row.try_get(first.saturating_sub(1)).unwrap_or_default();
            unreadable().with("id", id).because(error)
        })
    }

    fn read(
        &mut self,
        row: &SqliteRow,
        first: usize,
    ) -> std::result::Result<Message, Box<dyn std::error::Error + Send + Sync>> {
        let id: &[u8] = row.try_get(first)?;
        let topic: &str = row.try_get(first + 1)?;
        let topic = self.topic(topic)?;
        let kind: &str = row.try_get(first + 2)?;
        let source: Option<&str> = row.try_get(first + 3)?;
        let key: Option<&str> = row.try_get(first + 4)?;
        let content_type: &str = row.try_get(first + 5)?;
        let headers: &str = row.try_get(first + 6)?;
        let time_of: Option<i64> = row.try_get(first + 7)?;
        let payload: &[u8] = row.try_get(first + 8)?;
        let Headers {
            event_id,
            attributes,
            headers,
            ..
        } = Headers::from_text(headers)?;
        Ok(Message::from(MessageParts {
            id: MessageId::from_uuid(Uuid::from_slice(id)?),
            event_id,
            kind: shared(&mut self.kind, kind),
            source: source.map(|source| shared(&mut self.source, source)),
            topic,
            key: key.map(Into::into),
            attributes,
            headers,
            content_type: shared(&mut self.content_type, content_type),
            time: time_of.map(time),
            payload: payload.to_vec().into(),
        }))
    }
}

impl Reader {
    /// What stands for a message that cannot be read, where it is only shown.
    pub(crate) fn stand_in(row: &SqliteRow, first: usize) -> Message {
        let text = |column: usize| row.try_get::<Option<&str>, _>(first + column).ok().flatten();
        let mut id = [0; 16];
        let bytes: &[u8] = row.try_get(first).unwrap_or_default();
        id.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        let topic = text(1).and_then(|topic| Topic::parse(topic.to_owned()).ok());
        Message::from(MessageParts {
            id: MessageId::from_uuid(Uuid::from_bytes(id)),
            event_id: None,
            kind: Text::from(Arc::<str>::from(text(2).unwrap_or_default())),
            source: text(3).map(|source| Text::from(Arc::<str>::from(source))),
            topic: topic.unwrap_or(UNREADABLE),
            key: text(4).map(Into::into),
            attributes: Vec::new(),
            headers: Vec::new(),
            content_type: Text::from(Arc::<str>::from(text(5).unwrap_or_default())),
            time: row.try_get::<Option<i64>, _>(first + 7).ok().flatten().map(time),
            payload: row.try_get::<&[u8], _>(first + 8).unwrap_or_default().to_vec().into(),
        })
    }
}

/// The topic of what has none.
const UNREADABLE: Topic = Topic::new("unreadable");

pub(crate) fn errors_to_text(errors: &[AttemptError]) -> Result<String> {
    serde_json::to_string(errors).map_err(|e| {
        Error::new(ErrorKind::Unexpected, "the errors of a record cannot be stored").because(JsonError::from(e))
    })
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
