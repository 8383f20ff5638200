// What the derive says to each mistake.
use postrider::Event;

#[derive(serde::Serialize, serde::Deserialize, Event)]
struct NoName {
    id: u64,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "has space")]
struct BadName {
    id: u64,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "a", topic = "a..b")]
struct BadTopic {
    id: u64,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "a", version = 0)]
struct BadVersion {
    id: u64,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "a", key = "custmer")]
struct BadKey {
    id: u64,
    customer: String,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "a", key = "0")]
enum KeyOfAnEnum {
    A(u64),
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "a", name = "b")]
struct Twice {
    id: u64,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "a", partition = "id")]
struct Unknown {
    id: u64,
}

#[derive(Event)]
#[event(name = "a")]
struct NoSerde {
    id: u64,
}

fn main() {}
