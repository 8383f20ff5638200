//! Structured mode: one JSON text.

use super::{Reading, sequence_text, with_id};
use crate::{AttributeValue, Message};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use chrono::SecondsFormat;
use serde_json::{Value, value::RawValue};
use std::collections::BTreeMap;

pub(super) const DATA: &str = "data";
pub(super) const DATA_BASE64: &str = "data_base64";

pub(super) fn write(message: &Message) -> Bytes {
    let mut text = Object::default();
    text.string("specversion", "1.0");
    with_id(message, |id| text.string("id", id));
    text.string("type", message.kind());
    text.string("source", message.source().unwrap_or_default());
    // What came from elsewhere may have a time or a sequence that is none: it stays what it was.
    let is_free = |name: &str| message.attribute(name).is_none();
    if let Some(time) = message.time().filter(|_| is_free("time")) {
        text.string("time", &time.to_rfc3339_opts(SecondsFormat::AutoSi, true));
    }
    if let Some(key) = message.key() {
        text.string("partitionkey", key);
    }
    if let Some(position) = message.sequence().filter(|_| is_free("sequence")) {
        text.string("sequence", &sequence_text(position));
    }
    let attributes = message.attributes().iter();
    for (name, value) in attributes.filter(|(name, _)| !matches!(name.as_str(), DATA | DATA_BASE64)) {
        text.raw(name, &value.to_json().to_string());
    }
    text.string("datacontenttype", message.content_type());
    let raw = is_json(message.content_type())
        .then(|| serde_json::from_slice::<&RawValue>(message.payload()).ok())
        .flatten();
    match raw {
        // Byte for byte.
        Some(raw) => text.raw(DATA, raw.get()),
        None => text.string(DATA_BASE64, &STANDARD.encode(message.payload())),
    }
    text.end()
}

/// An object that is being written; the values are texts.
#[derive(Default)]
struct Object(String);

impl Object {
    fn raw(&mut self, name: &str, json: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        self.0.push_str(&Value::from(name).to_string());
        self.0.push(':');
        self.0.push_str(json);
    }
    fn string(&mut self, name: &str, value: &str) {
        self.raw(name, &Value::from(value).to_string());
    }
    fn end(mut self) -> Bytes {
        self.0.push('}');
        self.0.into()
    }
}

/// Whether a content type is one of JSON.
fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json")
        || kind.eq_ignore_ascii_case("text/json")
        || kind.len() > 5
            && kind.is_char_boundary(kind.len() - 5)
            && kind[kind.len() - 5..].eq_ignore_ascii_case("+json")
}

/// Takes a message apart. `None` if it is no CloudEvent in JSON: then it is what it is.
pub(super) fn read(payload: &Bytes, reading: &mut Reading<'_>) -> Option<(Option<String>, Bytes)> {
    // Some put a byte order mark before it.
    let json = payload.strip_prefix(b"\xef\xbb\xbf").unwrap_or(payload);
    // The data are wanted byte for byte, however deep or large they are.
    let mut members: BTreeMap<String, &RawValue> = serde_json::from_slice(json).ok()?;
    members.get("specversion")?;
    let data = members.remove(DATA);
    let text = |value: Option<&RawValue>| value.and_then(|value| serde_json::from_str::<String>(value.get()).ok());
    let content_type = text(members.remove("datacontenttype")).filter(|text| !text.is_empty());
    let base64 = text(members.remove(DATA_BASE64));
    let body = match (data, base64) {
        (_, Some(base64)) => STANDARD.decode(base64).ok()?.into(),
        (Some(raw), None) => match &content_type {
            // A text of another type is what is between the quotes.
            Some(other) if !is_json(other) && raw.get() == "null" => Bytes::new(),
            Some(other) if !is_json(other) => match serde_json::from_str::<String>(raw.get()) {
                Ok(text) => text.into(),
                Err(_) => payload.slice_ref(raw.get().as_bytes()),
            },
            _ => payload.slice_ref(raw.get().as_bytes()),
        },
        (None, None) => Bytes::new(),
    };
    for (name, value) in members {
        match serde_json::from_str(value.get()) {
            Ok(Value::Null) => {}
            Ok(value) => reading.attribute(&name, AttributeValue::from_json(value)),
            // Too deep, or too large a number.
            Err(_) => reading.attribute(&name, AttributeValue::from(value.get())),
        }
    }
    Some((content_type.or_else(|| Some("application/json".to_owned())), body))
}
