//! Rows and what they mean.

use bytes::Bytes;
use postrider_core::{
    Error, ErrorKind, Message, MessageId, MessageParts, Result, Topic,
    clock::{Timestamp, bounded},
    event::JsonError,
    log::{AttemptError, Headers},
    message::Text,
};
use sqlx::{
    Decode, Postgres, Row as _, Type, ValueRef as _,
    error::BoxDynError,
    postgres::{PgRow, PgTypeInfo, PgValueFormat, PgValueRef},
};
use std::{sync::Arc, time::Duration};
use uuid::Uuid;

/// The lane of a key: part of the format, and the same as `lane_of` in SQL.
pub(crate) fn lane_of(key: Option<&str>, id: MessageId) -> i16 {
    postrider_core::partition::slot_of(key, id).into()
}

/// A delay as the statements take it, in seconds; more than a century counts as one.
pub(crate) fn secs(duration: Duration) -> f64 {
    bounded(duration).as_secs_f64()
}

/// A time as Postgres has it, which goes farther than ours: `infinity` and years beyond those of [`Timestamp`] are read as
/// its last and first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Time(pub(crate) Timestamp);

impl Type<Postgres> for Time {
    fn type_info() -> PgTypeInfo {
        <Timestamp as Type<Postgres>>::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for Time {
    fn decode(value: PgValueRef<'r>) -> std::result::Result<Self, BoxDynError> {
        if value.format() == PgValueFormat::Text {
            return Ok(match value.as_str()? {
                "infinity" => Self(Timestamp::MAX_UTC),
                "-infinity" => Self(Timestamp::MIN_UTC),
                _ => Self(<Timestamp as Decode<Postgres>>::decode(value)?),
            });
        }
        let micros = <i64 as Decode<Postgres>>::decode(value)?;
        // Postgres counts from the year 2000.
        let since_1970 = micros.saturating_add(946_684_800_000_000);
        let beyond = if micros < 0 {
            Timestamp::MIN_UTC
        } else {
            Timestamp::MAX_UTC
        };
        Ok(Self(Timestamp::from_timestamp_micros(since_1970).unwrap_or(beyond)))
    }
}

/// The time in a column, if there is one.
pub(crate) fn time(row: &PgRow, column: usize) -> Option<Timestamp> {
    row.try_get::<Option<Time>, _>(column).ok().flatten().map(|time| time.0)
}

/// Why a row cannot be read, without what it carries.
pub(crate) fn reason(error: &Error) -> String {
    error.to_chain()
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

fn unreadable() -> Error {
    Error::new(
        ErrorKind::Storage,
        "a row of the event log cannot be read: was it written by something else?",
    )
}

/// Where a record is: its lane and its position.
pub(crate) fn place(row: &PgRow, first: usize) -> (i16, i64) {
    (row.get(first), row.get(first + 1))
}

/// Whether a column of a row has no value.
pub(crate) fn is_null(row: &PgRow, column: usize) -> bool {
    row.try_get_raw(column).is_ok_and(|value| value.is_null())
}

impl Reader {
    /// The message in the columns from `first` on, which begin with lane and id.
    pub(crate) fn message(&mut self, row: &PgRow, first: usize) -> Result<Message> {
        self.read(row, first).map_err(|error| {
            let id: i64 = row.try_get(first + 1).unwrap_or_default();
            unreadable().with("id", id).because(error)
        })
    }

    fn read(
        &mut self,
        row: &PgRow,
        first: usize,
    ) -> std::result::Result<Message, Box<dyn std::error::Error + Send + Sync>> {
        let id: i64 = row.try_get(first + 1)?;
        let message_id: Uuid = row.try_get(first + 2)?;
        let topic: &str = row.try_get(first + 3)?;
        let topic = match &self.topic {
            Some(last) if last.as_str() == topic => last.clone(),
            _ => self.topic.insert(Topic::parse(topic.to_owned())?).clone(),
        };
        let kind: &str = row.try_get(first + 4)?;
        let source: Option<&str> = row.try_get(first + 5)?;
        let key: Option<&str> = row.try_get(first + 6)?;
        let content_type: &str = row.try_get(first + 7)?;
        let headers: &str = row.try_get(first + 8)?;
        let time: Option<Time> = row.try_get(first + 9)?;
        let payload: &[u8] = row.try_get(first + 10)?;
        let Headers {
            event_id,
            attributes,
            headers,
            ..
        } = Headers::from_text(headers)?;
        let message = Message::from(MessageParts {
            id: MessageId::from_uuid(message_id),
            event_id,
            kind: shared(&mut self.kind, kind),
            source: source.map(|source| shared(&mut self.source, source)),
            topic,
            key: key.map(Into::into),
            attributes,
            headers,
            content_type: shared(&mut self.content_type, content_type),
            time: time.map(|time| time.0),
            payload: Bytes::copy_from_slice(payload),
        });
        Ok(message.with_sequence(id.unsigned_abs()))
    }
}

impl Reader {
    /// What stands for a message that cannot be read, where it is only shown.
    pub(crate) fn stand_in(row: &PgRow, first: usize) -> Message {
        let text = |column: usize| row.try_get::<Option<&str>, _>(first + column).ok().flatten();
        let topic = text(3).and_then(|topic| Topic::parse(topic.to_owned()).ok());
        let message = Message::from(MessageParts {
            id: MessageId::from_uuid(row.try_get(first + 2).unwrap_or_default()),
            event_id: None,
            kind: Text::from(Arc::<str>::from(text(4).unwrap_or_default())),
            source: text(5).map(|source| Text::from(Arc::<str>::from(source))),
            topic: topic.unwrap_or(UNREADABLE),
            key: text(6).map(Into::into),
            attributes: Vec::new(),
            headers: Vec::new(),
            content_type: Text::from(Arc::<str>::from(text(7).unwrap_or_default())),
            time: time(row, first + 9),
            payload: Bytes::copy_from_slice(row.try_get(first + 10).unwrap_or_default()),
        });
        message.with_sequence(place(row, first).1.unsigned_abs())
    }
}

/// The topic of what has none.
const UNREADABLE: Topic = Topic::new("unreadable");

pub(crate) fn errors_to_text(errors: &[AttemptError]) -> Result<String> {
    let kept = &errors[errors.len().saturating_sub(AttemptError::KEPT)..];
    serde_json::to_string(kept).map_err(|e| {
        Error::new(ErrorKind::Unexpected, "the errors of a record cannot be stored").because(JsonError::from(e))
    })
}

/// The errors kept; what is none counts as no errors, since nothing depends on them.
pub(crate) fn errors_from_text(text: &str) -> Vec<AttemptError> {
    serde_json::from_str(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table in the documentation: whoever writes rows himself goes by it.
    #[test]
    fn the_lanes_of_keys_are_part_of_the_format() {
        let id = MessageId::from_uuid(Uuid::nil());
        let long = "k".repeat(512);
        let vectors = [
            ("a", 12),
            ("order-1", 46),
            ("order-2", 24),
            ("ada", 12),
            (" ", 50),
            ("ä", 4),
            ("🦀", 12),
            ("日本", 13),
            (&long, 12),
        ];
        for (key, lane) in vectors {
            assert_eq!(lane_of(Some(key), id), lane, "{key:?}");
        }
        assert_eq!(lane_of(None, id), 10);
    }
}
