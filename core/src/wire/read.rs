//! What arrives.

use super::{Names, OURS, STRUCTURED, identity, json};
use crate::{
    AttributeValue, Message, MessageId, MessageParts, Topic,
    clock::Timestamp,
    message::{Text, place_of},
};
use bytes::Bytes;
use std::{borrow::Cow, sync::Arc};

/// Reads what arrives, and shares what messages have in common: a feed has few types and sources.
#[derive(Debug, Default)]
pub struct Reader {
    kind: Option<Text>,
    source: Option<Text>,
    content_type: Option<Text>,
}

/// What a broker says of a message apart from its headers. All but topic and payload are what it is taken for when the
/// headers do not say.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Arrived<'a> {
    /// Where it was sent to.
    pub topic: &'a Topic,
    /// The bytes.
    pub payload: Bytes,
    /// The content type.
    pub content_type: Option<&'a str>,
    /// The broker's own key.
    pub key: Option<&'a [u8]>,
    /// The id, the type and the application in fields of the broker's own.
    pub id: Option<&'a str>,
    /// See `id`.
    pub kind: Option<&'a str>,
    /// See `id`. Without one, the place in the broker that the message was sent to, as a URI.
    pub source: Option<&'a str>,
    /// When the broker got it.
    pub time: Option<Timestamp>,
    /// Where it lies in the broker: a text that is the same each time it is delivered, and no other message's, also not after the
    /// place was emptied or made anew.
    pub place: Option<String>,
}

impl<'a> Arrived<'a> {
    /// Bytes that were sent to a topic, and nothing else.
    #[must_use]
    pub fn new(topic: &'a Topic, payload: impl Into<Bytes>) -> Self {
        Self {
            topic,
            payload: payload.into(),
            content_type: None,
            key: None,
            id: None,
            kind: None,
            source: None,
            time: None,
            place: None,
        }
    }
}

/// A message that is being read, header by header.
#[derive(Debug)]
pub struct Reading<'r> {
    reader: &'r mut Reader,
    names: &'r Names,
    id: Option<Text>,
    kind: Option<Text>,
    source: Option<Text>,
    content_type: Option<Text>,
    key: Option<Box<str>>,
    time: Option<Timestamp>,
    sequence: Option<u64>,
    attributes: Vec<(Text, AttributeValue)>,
    headers: Vec<(String, String)>,
}

impl Reader {
    /// Begins with a message.
    pub fn begin<'r>(&'r mut self, names: &'r Names) -> Reading<'r> {
        Reading {
            reader: self,
            names,
            id: None,
            kind: None,
            source: None,
            content_type: None,
            key: None,
            time: None,
            sequence: None,
            attributes: Vec::new(),
            headers: Vec::new(),
        }
    }
}

fn shared(last: &mut Option<Text>, text: &str) -> Text {
    match last {
        Some(last) if last.as_str() == text => last.clone(),
        _ => last.insert(Text::from(Arc::<str>::from(&*clean(text)))).clone(),
    }
}

/// Whether an attribute is a field of a message, or says how it is laid out.
fn is_field(name: &str) -> bool {
    matches!(
        name,
        "specversion" | "id" | "type" | "source" | "partitionkey" | "datacontenttype"
    )
}

/// Whether an attribute is a text by its nature.
fn is_text_field(name: &str) -> bool {
    is_field(name) || matches!(name, "time" | "sequence")
}

/// Whether a message of this content type is an event in structured mode.
pub(super) fn is_structured(content_type: &str) -> bool {
    let start = content_type.get(..STRUCTURED.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(STRUCTURED))
}

/// A time; one without a zone, which some write, counts as UTC.
fn moment(text: &str) -> Result<Timestamp, chrono::ParseError> {
    let utc = |naive: chrono::NaiveDateTime| naive.and_utc();
    text.parse().or_else(|error| text.parse().map(utc).map_err(|_| error))
}

/// No log stores NUL in a text.
fn clean(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        Cow::Owned(text.replace('\0', "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

impl Reading<'_> {
    /// Takes a header. Bytes that are not UTF-8 are kept as a data URL, and are bytes again when the message is published.
    pub fn header(&mut self, name: &str, value: &[u8]) {
        let value = super::text_of(value);
        if let Some(attribute) = self.names.attribute(name) {
            match attribute {
                // No attribute has such a name: in structured mode it would stand in place of the payload.
                json::DATA | json::DATA_BASE64 => self.keep(attribute, &value),
                attribute => self.text_attribute(attribute, &value),
            }
        } else if name.eq_ignore_ascii_case("content-type") && value.is_empty() {
            // As good as none.
        } else if name.eq_ignore_ascii_case("content-type") {
            self.content_type = Some(shared(&mut self.reader.content_type, &value));
        } else {
            self.keep(name, &value);
        }
    }

    fn keep(&mut self, name: &str, value: &str) {
        // A header without a name cannot be stored, nor can ours be forged.
        if !name.is_empty()
            && !name
                .get(..OURS.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(OURS))
        {
            self.headers.push((clean(name).into_owned(), clean(value).into_owned()));
        }
    }

    /// Takes a header that has a type of its own in the broker.
    pub fn typed_header(&mut self, name: &str, value: AttributeValue) {
        match self.names.attribute(name) {
            Some(attribute) => self.attribute(attribute, value),
            None => match value {
                AttributeValue::Binary(bytes) => self.header(name, &bytes),
                value => self.header(name, value.as_text().as_bytes()),
            },
        }
    }

    /// Takes the time, where the broker has a type for that.
    pub fn time(&mut self, time: Timestamp) {
        self.time.get_or_insert(time);
    }

    /// Takes an attribute; the first of a name counts.
    pub(super) fn attribute(&mut self, name: &str, value: AttributeValue) {
        match value {
            AttributeValue::Text(text) => self.text_attribute(name, &text),
            // Of a type that brokers have and fields do not: bytes that are a text, say.
            AttributeValue::Binary(bytes) if is_text_field(name) => self.text_attribute(name, &super::text_of(&bytes)),
            value if is_text_field(name) => self.text_attribute(name, &value.as_text()),
            value => self.keep_attribute(name, value),
        }
    }

    fn has_attribute(&self, name: &str) -> bool {
        place_of(&self.attributes, name).is_ok()
    }

    fn keep_attribute(&mut self, name: &str, value: AttributeValue) {
        let name = clean(name);
        if let (false, Err(at)) = (name.is_empty(), place_of(&self.attributes, &name)) {
            self.attributes.insert(at, (name.into_owned().into(), value));
        }
    }

    fn text_attribute(&mut self, name: &str, value: &str) {
        match name {
            "specversion" => {}
            "id" if self.id.is_none() && !value.is_empty() => self.id = Some(clean(value).into_owned().into()),
            "type" if self.kind.is_none() && !value.is_empty() => {
                self.kind = Some(shared(&mut self.reader.kind, value));
            }
            "source" if self.source.is_none() && !value.is_empty() => {
                self.source = Some(shared(&mut self.reader.source, value));
            }
            "partitionkey" if self.key.is_none() && !value.is_empty() => self.key = Some(clean(value).into()),
            "datacontenttype" if self.content_type.is_none() && !value.is_empty() => {
                self.content_type = Some(shared(&mut self.reader.content_type, value));
            }
            // What is none stays an attribute.
            "time" if self.time.is_none() && !self.has_attribute(name) => match moment(value) {
                Ok(time) => self.time = Some(time),
                Err(_) => self.keep_attribute(name, AttributeValue::from(&*clean(value))),
            },
            "sequence" if self.sequence.is_none() && !self.has_attribute(name) => match value.parse() {
                Ok(position) => self.sequence = Some(position),
                Err(_) => self.keep_attribute(name, AttributeValue::from(&*clean(value))),
            },
            "time" | "sequence" => {}
            field if is_field(field) => {}
            other => self.keep_attribute(other, AttributeValue::from(&*clean(value))),
        }
    }

    /// Whether an id has come: what it would be taken for otherwise need not be found out.
    #[must_use]
    pub fn has_id(&self) -> bool {
        self.id.is_some()
    }

    /// Whether a source has come.
    #[must_use]
    pub fn has_source(&self) -> bool {
        self.source.is_some()
    }

    /// Whether a time has come.
    #[must_use]
    pub fn has_time(&self) -> bool {
        self.time.is_some()
    }

    /// The message.
    #[must_use]
    pub fn finish(mut self, arrived: Arrived<'_>) -> Message {
        let mut payload = arrived.payload;
        let content_type = self.content_type.take();
        let outer = content_type
            .as_deref()
            .or(arrived.content_type.filter(|text| !text.is_empty()));
        let mut content_type = match outer {
            Some(text) => Some(shared(&mut self.reader.content_type, text)),
            None => None,
        };
        if content_type.as_deref().is_some_and(is_structured)
            && let Some((inner, body)) = json::read(&payload, &mut self)
        {
            payload = body;
            content_type = inner.map(|text| shared(&mut self.reader.content_type, &text));
        }
        let source = match (self.source, arrived.source.filter(|source| !source.is_empty())) {
            (Some(source), _) => Some(source),
            (None, Some(source)) => Some(shared(&mut self.reader.source, source)),
            (None, None) => None,
        };
        let from = source.as_deref().unwrap_or_default();
        let id = self.id.as_deref().or(arrived.id.filter(|id| !id.is_empty()));
        let (id, event_id) = match (id, arrived.place) {
            (Some(text), _) => identity(from, &clean(text)),
            (None, Some(place)) => (MessageId::foreign(from, &place), Some(place.into())),
            (None, None) => {
                let id = MessageId::new();
                (id, Some(id.to_string().into()))
            }
        };
        let of_broker = || {
            let key = arrived.key.filter(|key| !key.is_empty())?;
            Some(match std::str::from_utf8(key) {
                Ok(key) => clean(key).into(),
                // A number, say: its digits in hexadecimal keep the order of those that have it.
                Err(_) => key.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into(),
            })
        };
        let kind = match (self.kind, arrived.kind.filter(|kind| !kind.is_empty())) {
            (Some(kind), _) => kind,
            (None, Some(kind)) => shared(&mut self.reader.kind, kind),
            (None, None) => shared(&mut self.reader.kind, arrived.topic.as_str()),
        };
        let message = Message::from(MessageParts {
            id,
            event_id,
            kind,
            source,
            topic: arrived.topic.clone(),
            key: self.key.or_else(of_broker),
            attributes: self.attributes,
            headers: self.headers,
            content_type: content_type.unwrap_or(Text::from_static("application/octet-stream")),
            time: self.time.or(arrived.time),
            payload,
        });
        match self.sequence {
            Some(position) => message.with_sequence(position),
            None => message,
        }
    }
}
