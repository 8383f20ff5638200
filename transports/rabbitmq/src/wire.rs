//! Messages and what AMQP makes of them.

use crate::config::{AttributePrefix, RabbitMqOptions};
use lapin::{
    BasicProperties,
    message::Delivery,
    types::{AMQPValue, FieldArray, FieldTable, MAX_SHORT_STRING_LENGTH, ShortString},
};
use postrider_core::{
    AttributeValue, Message, Topic,
    clock::Timestamp,
    wire::{Arrived, Format, Names, Reader, Value},
};
use std::borrow::Cow;

/// As CloudEvents' binding for AMQP says, with what other bindings write.
const NAMES: Names = postrider_core::wire_names!("cloudEvents_", also "cloudEvents:", "ce-", "ce_");
const COLON: Names = postrider_core::wire_names!("cloudEvents:", also "cloudEvents_", "ce-", "ce_");
const DASH: Names = postrider_core::wire_names!("ce-", also "cloudEvents_", "cloudEvents:", "ce_");

/// How messages are written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    format: Format,
    names: &'static Names,
}

impl Layout {
    pub(crate) fn of(options: &RabbitMqOptions) -> Self {
        Self {
            format: options.format,
            names: match options.attribute_prefix {
                AttributePrefix::CloudEventsUnderscore => &NAMES,
                AttributePrefix::CloudEventsColon => &COLON,
                AttributePrefix::CeDash => &DASH,
            },
        }
    }
}

/// Of copies of a message: where it was sent to, how often it had been delivered, and how often it had been tried.
const TOPIC: &str = "postrider-topic";
const DELIVERIES: &str = "postrider-deliveries";
const ATTEMPTS: &str = "postrider-attempts";

/// Names of headers that the broker takes for routing keys, and closes the channel over if they hold a text; and what such
/// headers of a message are called instead.
const TAKEN: [(&str, &str); 2] = [("CC", "postrider-CC"), ("BCC", "postrider-BCC")];

/// What the broker adds.
const OF_BROKER: [&str; 3] = ["x-death", "x-delivery-count", "x-opt-"];
const OF_BROKER_TOO: [&str; 2] = ["x-first-death-", "x-last-death-"];

/// A copy that is to wait, or to lie among the dead letters.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    /// How often the message had been delivered.
    pub(crate) deliveries: u32,
    /// How often it had been tried, if that is to be known when it comes back.
    pub(crate) attempts: u32,
    /// What the copy is known by: nobody shall take it for the message.
    pub(crate) id: String,
}

/// The properties and the body of a message, or of a copy of one.
pub(crate) fn write(message: &Message, layout: Layout, copied: Option<&Copied>) -> (BasicProperties, bytes::Bytes) {
    let mut headers = FieldTable::default();
    let body = layout.names.write(message, layout.format, |name, value| {
        let taken = TAKEN.iter().find(|(taken, _)| *taken == name);
        add(&mut headers, taken.map_or(name, |(_, instead)| instead), native(value));
    });
    let mut id = message.event_id();
    let text = |text: &str| AMQPValue::LongString(text.into());
    if let Some(copied) = copied {
        add(&mut headers, TOPIC, text(message.topic().as_str()));
        add(&mut headers, DELIVERIES, text(&copied.deliveries.to_string()));
        if copied.attempts > 0 {
            add(&mut headers, ATTEMPTS, text(&copied.attempts.to_string()));
        }
        id = Cow::Borrowed(&copied.id);
    }
    if body.content_type.len() > MAX_SHORT_STRING_LENGTH {
        let name = format!("{}datacontenttype", layout.names.prefix);
        add(&mut headers, &name, text(&body.content_type));
    }
    let mut properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(short(&id))
        .with_content_type(short(&body.content_type))
        .with_type(short(message.kind()))
        .with_headers(headers);
    if let Some(seconds) = message.time().and_then(|time| u64::try_from(time.timestamp()).ok()) {
        properties = properties.with_timestamp(seconds);
    }
    if let Some(source) = message.source() {
        properties = properties.with_app_id(short(source));
    }
    (properties, body.payload)
}

/// What a short text holds of a longer one, which only messages of others have.
fn short(text: &str) -> ShortString {
    let mut end = text.len().min(MAX_SHORT_STRING_LENGTH);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].into()
}

/// The bytes that properties have on the wire, or a few more.
pub(crate) fn size(properties: &BasicProperties) -> usize {
    let short = |text: &Option<ShortString>| text.as_ref().map_or(0, |text| 1 + text.as_str().len());
    let headers = properties.headers().as_ref().map_or(0, size_of_table);
    32 + headers
        + short(properties.message_id())
        + short(properties.content_type())
        + short(properties.kind())
        + short(properties.app_id())
}

fn size_of_table(table: &FieldTable) -> usize {
    let entries = table.inner().iter();
    4 + entries
        .map(|(name, value)| 1 + name.as_str().len() + size_of_value(value))
        .sum::<usize>()
}

fn size_of_value(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::LongString(text) => 5 + text.as_bytes().len(),
        AMQPValue::ByteArray(bytes) => 5 + bytes.as_slice().len(),
        AMQPValue::FieldArray(values) => 5 + values.as_slice().iter().map(size_of_value).sum::<usize>(),
        AMQPValue::FieldTable(table) => 1 + size_of_table(table),
        _ => 9,
    }
}

/// What AMQP has for a value.
fn native(value: Value<'_>) -> AMQPValue {
    match value {
        Value::Integer(n) => AMQPValue::LongInt(n),
        Value::Boolean(yes) => AMQPValue::Boolean(yes),
        Value::Binary(bytes) | Value::Bytes(bytes) => AMQPValue::ByteArray(bytes.to_vec().into()),
        other => AMQPValue::LongString(other.as_text().as_bytes().into()),
    }
}

/// What CloudEvents has for a value of AMQP; `None` if it is a text to be.
fn typed(value: &AMQPValue) -> Option<AttributeValue> {
    let whole = |n: i64| match i32::try_from(n) {
        Ok(n) => AttributeValue::Integer(n),
        Err(_) => AttributeValue::from(n.to_string()),
    };
    Some(match value {
        AMQPValue::Boolean(yes) => AttributeValue::Boolean(*yes),
        AMQPValue::ShortShortInt(n) => whole((*n).into()),
        AMQPValue::ShortShortUInt(n) => whole((*n).into()),
        AMQPValue::ShortInt(n) => whole((*n).into()),
        AMQPValue::ShortUInt(n) => whole((*n).into()),
        AMQPValue::LongInt(n) => whole((*n).into()),
        AMQPValue::LongUInt(n) => whole((*n).into()),
        AMQPValue::LongLongInt(n) => whole(*n),
        AMQPValue::Timestamp(n) => moment(i64::try_from(*n).ok()?)?.into(),
        AMQPValue::ByteArray(bytes) => AttributeValue::Binary(bytes.as_slice().to_vec().into()),
        _ => return None,
    })
}

/// The time of an AMQP timestamp, which is in seconds, or in milliseconds, as the Python SDK writes it.
fn moment(n: i64) -> Option<Timestamp> {
    // Seconds up to the year 5138; in milliseconds this is in 1973.
    match n.abs() < 100_000_000_000 {
        true => Timestamp::from_timestamp(n, 0),
        false => Timestamp::from_timestamp_millis(n),
    }
}

/// A name that is there already has a list of values: a table has no name twice.
fn add(headers: &mut FieldTable, name: &str, value: AMQPValue) {
    let value = match headers.inner().get(name) {
        None => value,
        Some(AMQPValue::FieldArray(array)) => {
            let mut values = array.clone();
            values.push(value);
            AMQPValue::FieldArray(values)
        }
        Some(first) => AMQPValue::FieldArray(FieldArray::from(vec![first.clone(), value])),
    };
    headers.insert(short(name), value);
}

/// A message, how often it has been delivered, this time included, and how often it had been tried before it waited.
pub(crate) fn read(
    reader: &mut Reader,
    delivery: Delivery,
    topic_named: impl FnOnce(&str) -> Topic,
) -> (Message, u32, u32) {
    let properties = &delivery.properties;
    let mut reading = reader.begin(&NAMES);
    let (mut topic, mut deliveries, mut attempts) = (None, 0_u32, 0);
    for (name, value) in properties.headers().iter().flat_map(|headers| headers.inner()) {
        let name = name.as_str();
        let name = TAKEN
            .iter()
            .find(|(_, instead)| *instead == name)
            .map_or(name, |(taken, _)| taken);
        match name {
            TOPIC => topic = Some(text(value)),
            DELIVERIES => deliveries = deliveries.saturating_add(number(value)),
            ATTEMPTS => attempts = number(value),
            "x-delivery-count" => deliveries = deliveries.saturating_add(number(value)),
            _ if OF_BROKER.contains(&name) || OF_BROKER_TOO.iter().any(|start| name.starts_with(start)) => {}
            _ if is_time(name) => match number_of(value).and_then(moment) {
                Some(time) => reading.time(time),
                None => reading.header(name, text(value).as_bytes()),
            },
            _ => match value {
                AMQPValue::LongString(value) => reading.header(name, value.as_bytes()),
                AMQPValue::FieldArray(values) => {
                    values
                        .as_slice()
                        .iter()
                        .for_each(|value| reading.header(name, text(value).as_bytes()));
                }
                other => match typed(other) {
                    Some(value) => reading.typed_header(name, value),
                    None => reading.header(name, text(other).as_bytes()),
                },
            },
        }
    }
    let name = topic.unwrap_or_else(|| crate::topology::topic_of(delivery.routing_key.as_str()).to_owned());
    let topic = topic_named(&name);
    // What plain AMQP has fields for goes on as headers.
    let fields = [
        ("content_encoding", properties.content_encoding()),
        ("correlation_id", properties.correlation_id()),
        ("reply_to", properties.reply_to()),
        ("expiration", properties.expiration()),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            reading.header(name, value.as_str().as_bytes());
        }
    }
    if let Some(priority) = properties.priority() {
        reading.header("priority", priority.to_string().as_bytes());
    }
    let app = properties
        .app_id()
        .as_ref()
        .map(|text| text.as_str())
        .filter(|app| !app.is_empty());
    let place = match (app, reading.has_source()) {
        (None, false) => Some(format!("amqp:{}/{topic}", delivery.exchange)),
        _ => None,
    };
    let arrived = Arrived {
        source: app.or(place.as_deref()),
        content_type: properties.content_type().as_ref().map(|text| text.as_str()),
        id: properties.message_id().as_ref().map(|text| text.as_str()),
        kind: properties.kind().as_ref().map(|text| text.as_str()),
        time: properties
            .timestamp()
            .and_then(|time| moment(i64::try_from(time).ok()?)),
        ..Arrived::new(&topic, delivery.data)
    };
    (reading.finish(arrived), deliveries.saturating_add(1), attempts)
}

/// Whether a header is the time of an event.
fn is_time(name: &str) -> bool {
    NAMES.attribute(name) == Some("time")
}

fn number_of(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::Timestamp(n) => i64::try_from(*n).ok(),
        AMQPValue::LongLongInt(n) => Some(*n),
        AMQPValue::LongInt(n) => Some((*n).into()),
        AMQPValue::LongUInt(n) => Some((*n).into()),
        _ => None,
    }
}

fn number(value: &AMQPValue) -> u32 {
    text(value).parse().unwrap_or(0)
}

fn text(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        AMQPValue::ByteArray(bytes) => String::from_utf8_lossy(bytes.as_slice()).into_owned(),
        AMQPValue::ShortString(text) => text.as_str().to_owned(),
        AMQPValue::Boolean(value) => value.to_string(),
        AMQPValue::ShortShortInt(n) => n.to_string(),
        AMQPValue::ShortShortUInt(n) => n.to_string(),
        AMQPValue::ShortInt(n) => n.to_string(),
        AMQPValue::ShortUInt(n) => n.to_string(),
        AMQPValue::LongInt(n) => n.to_string(),
        AMQPValue::LongUInt(n) => n.to_string(),
        AMQPValue::LongLongInt(n) => n.to_string(),
        AMQPValue::Timestamp(n) => n.to_string(),
        AMQPValue::Float(n) => n.to_string(),
        AMQPValue::Double(n) => n.to_string(),
        AMQPValue::Void => String::new(),
        // Tables, lists in lists and decimals: as JSON, which others can read.
        other => json(other).to_string(),
    }
}

fn json(value: &AMQPValue) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        AMQPValue::FieldTable(table) => {
            let entries = table.inner().iter();
            Json::Object(entries.map(|(name, value)| (name.to_string(), json(value))).collect())
        }
        AMQPValue::FieldArray(values) => Json::Array(values.as_slice().iter().map(json).collect()),
        AMQPValue::DecimalValue(decimal) => {
            let value = f64::from(decimal.value) / 10_f64.powi(i32::from(decimal.scale));
            Json::from(value)
        }
        AMQPValue::Boolean(yes) => Json::from(*yes),
        AMQPValue::Void => Json::Null,
        AMQPValue::Float(n) => Json::from(*n),
        AMQPValue::Double(n) => Json::from(*n),
        other => match typed(other) {
            Some(AttributeValue::Integer(n)) => Json::from(n),
            _ => Json::from(text(other)),
        },
    }
}
