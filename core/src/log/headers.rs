//! How headers and attributes lie in a column of a log.

use crate::{
    AttributeValue, Error, ErrorKind, Message, Result,
    event::JsonError,
    message::{Text, place_of},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde_json::{Value, json};

/// What the names of attributes begin with, where they lie among headers: no header is called so.
const ATTRIBUTE: &str = "ce-";
const EVENT_ID: &str = "ce-id";

/// The headers, the attributes, and the CloudEvents id of a message, as a log keeps them in one text: a JSON array of pairs of
/// name and value, where the names of attributes begin with `ce-`. Attributes are texts, numbers, truth values, or
/// `{"base64": …}`.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Headers {
    /// As in [`MessageParts`](crate::MessageParts).
    pub event_id: Option<Text>,
    /// The attributes, by name.
    pub attributes: Vec<(Text, AttributeValue)>,
    /// The headers, in order.
    pub headers: Vec<(String, String)>,
}

impl Headers {
    /// Those of a message, as text.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if they cannot be had as JSON.
    pub fn to_text(message: &Message) -> Result<String> {
        let (attributes, headers) = (message.attributes(), message.headers());
        let id = message.event_id_text();
        let invalid = |e| Error::new(ErrorKind::Invalid, "the headers cannot be stored").because(JsonError::from(e));
        if attributes.is_empty() && id.is_none() {
            return match headers.is_empty() {
                true => Ok("[]".to_owned()),
                false => serde_json::to_string(headers).map_err(invalid),
            };
        }
        let mut pairs: Vec<Value> = Vec::with_capacity(1 + attributes.len() + headers.len());
        pairs.extend(id.map(|id| json!([EVENT_ID, id.as_str()])));
        pairs.extend(attributes.iter().map(|(name, value)| {
            let value = match value {
                AttributeValue::Binary(bytes) => json!({ "base64": STANDARD.encode(bytes) }),
                other => other.to_json(),
            };
            json!([format!("{ATTRIBUTE}{name}"), value])
        }));
        pairs.extend(headers.iter().map(|(name, value)| json!([name, value])));
        serde_json::to_string(&pairs).map_err(invalid)
    }

    /// Out of such a text.
    ///
    /// # Errors
    /// [`ErrorKind::Storage`] if it is none. The values are left out: they may be secret.
    pub fn from_text(text: &str) -> Result<Self> {
        let mut all = Self::default();
        if text == "[]" {
            return Ok(all);
        }
        let unreadable = || Error::new(ErrorKind::Storage, "the headers are not a JSON array of pairs");
        let pairs: Vec<(String, Value)> = serde_json::from_str(text)
            .map_err(|error| unreadable().with("line", error.line()).with("column", error.column()))?;
        for (name, value) in pairs {
            match (name.strip_prefix(ATTRIBUTE), value) {
                (Some("id"), Value::String(id)) => all.event_id = Some(id.into()),
                (Some(name), value) => {
                    let value = attribute(value).ok_or_else(unreadable)?;
                    match place_of(&all.attributes, name) {
                        Ok(at) => all.attributes[at].1 = value,
                        Err(at) => all.attributes.insert(at, (name.to_owned().into(), value)),
                    }
                }
                (None, Value::String(value)) => all.headers.push((name, value)),
                (None, _) => return Err(unreadable()),
            }
        }
        Ok(all)
    }
}

fn attribute(value: Value) -> Option<AttributeValue> {
    if let Value::Object(object) = &value {
        let bytes = STANDARD.decode(object.get("base64")?.as_str()?).ok()?;
        return Some(AttributeValue::Binary(Bytes::from(bytes)));
    }
    Some(AttributeValue::from_json(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MessageId, MessageParts, Topic};

    #[test]
    fn what_is_stored_is_read() {
        let plain = Message::new(Topic::new("t"), "e.v1", "");
        assert_eq!(Headers::to_text(&plain).unwrap(), "[]");
        let plain = plain.with_header("a", "1").with_header("a", "\"2\"");
        let text = Headers::to_text(&plain).unwrap();
        assert_eq!(text, r#"[["a","1"],["a","\"2\""]]"#);
        let full = plain
            .with_attribute("tenantid", "acme")
            .with_attribute("level", -3)
            .with_attribute("urgent", true)
            .with_attribute("digest", Bytes::from_static(&[0xff, 0]));
        let text = Headers::to_text(&full).unwrap();
        let read = Headers::from_text(&text).unwrap();
        assert_eq!(
            (&*read.attributes, &*read.headers),
            (full.attributes(), full.headers()),
            "{text}"
        );

        let foreign = Message::from(MessageParts {
            id: MessageId::foreign("s", "A-1"),
            event_id: Some("A-1".to_owned().into()),
            kind: "e".into(),
            source: Some("s".into()),
            topic: Topic::new("t"),
            key: None,
            attributes: Vec::new(),
            headers: Vec::new(),
            content_type: "a/b".into(),
            time: None,
            payload: Bytes::new(),
        });
        let text = Headers::to_text(&foreign).unwrap();
        assert_eq!(text, r#"[["ce-id","A-1"]]"#);
        assert_eq!(Headers::from_text(&text).unwrap().event_id.as_deref(), Some("A-1"));
    }

    #[test]
    fn what_is_none_is_refused_without_its_values() {
        for text in [
            "{}",
            "[1]",
            r#"[["a",1]]"#,
            r#"[["ce-x",{"b":"secret"}]]"#,
            r#"[["a","secret"#,
        ] {
            let error = Headers::from_text(text).unwrap_err();
            assert!(!error.to_chain().contains("secret"), "{error}");
        }
    }
}
