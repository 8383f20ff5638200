use super::JsonError;
use crate::{Error, ErrorKind, Result};
use bytes::Bytes;

/// How events of type `E` are written and read. Belongs to the event type, so that both sides agree.
pub trait Codec<E> {
    /// The content type of what it writes.
    const CONTENT_TYPE: &'static str;

    /// Writes `event`.
    ///
    /// # Contract
    /// What it writes, [`decode`](Codec::decode) reads back as an equal event. Must not block.
    ///
    /// Held by `core::options_of_one_event_go_with_it`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it cannot be written; nothing is published then.
    fn encode(event: &E) -> Result<Bytes>;

    /// Reads an event.
    ///
    /// # Contract
    /// Takes any bytes, foreign ones too: refuses them with an error. A panic counts as one. The error is logged and stored
    /// with the dead letter: it quotes no value of the payload (for JSON: [`JsonError`]).
    ///
    /// Held by `core::what_does_not_decode_is_told_without_its_values`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the bytes are none; the message is then dead-lettered with this reason, never retried.
    fn decode(payload: &Bytes) -> Result<E>;
}

/// JSON, through serde: the default codec.
#[derive(Debug)]
pub enum Json {}

impl<E: serde::Serialize + serde::de::DeserializeOwned> Codec<E> for Json {
    const CONTENT_TYPE: &'static str = "application/json";

    fn encode(event: &E) -> Result<Bytes> {
        serde_json::to_vec(event).map(Bytes::from).map_err(|e| {
            Error::new(ErrorKind::Invalid, "the event cannot be encoded")
                .with("type", std::any::type_name::<E>())
                .because(JsonError::from(e))
        })
    }

    fn decode(payload: &Bytes) -> Result<E> {
        // Some put a byte order mark before it.
        let json = payload.strip_prefix(b"\xef\xbb\xbf").unwrap_or(payload);
        serde_json::from_slice(json).map_err(|e| {
            Error::new(ErrorKind::Invalid, "the payload does not decode")
                .with("type", std::any::type_name::<E>())
                .because(JsonError::from(e))
        })
    }
}
