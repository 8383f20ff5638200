//! Where the messages of a partition begin: behind what its group has committed, or where [`Start`] says if it has committed nothing.
//! The client is told not to choose a place by itself, so that none is passed over without a word.

use super::member::{Consumer, Place};
use crate::config::Start;
use postrider_core::Topic;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::Consumer as _,
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
};
use rustc_hash::FxHashMap;
use std::time::Duration;

/// Where partitions began of which the group had committed nothing, if that was not with the earliest message: until it commits
/// something, they begin there again.
pub(super) type Begun = FxHashMap<Place, i64>;

/// Says in `list` where the partitions begin of which the group has committed nothing.
///
/// # Errors
/// Where that cannot be known just now. Left to itself, the client looks once more, and reports what it does not find.
pub(super) fn choose(
    consumer: &Consumer,
    list: &mut TopicPartitionList,
    start: Start,
    begun: &mut Begun,
    limit: Duration,
) -> KafkaResult<()> {
    let mut new = uncommitted(consumer, list, limit)?;
    if new.count() == 0 {
        return Ok(());
    }
    let places: Vec<Place> = new
        .elements()
        .iter()
        .map(|new| (new.topic().to_owned(), new.partition()))
        .collect();
    if start == Start::Earliest {
        return places
            .iter()
            .try_for_each(|(topic, partition)| list.set_partition_offset(topic, *partition, Offset::Beginning));
    }
    // First where they end: what is stored while times are looked for lies behind that.
    for place in &places {
        if !begun.contains_key(place) {
            let (_, end) = consumer.fetch_watermarks(&place.0, place.1, limit)?;
            let mut at = end;
            if let Start::At(time) = start {
                new.set_all_offsets(Offset::Offset(time.timestamp_millis()))?;
                let found = consumer.offsets_for_times(new.clone(), limit)?;
                let found = found.find_partition(&place.0, place.1);
                if let Some(Offset::Offset(first)) = found.map(|found| found.offset()) {
                    at = first;
                }
            }
            begun.insert(place.clone(), at);
        }
        list.set_partition_offset(&place.0, place.1, Offset::Offset(begun[place]))?;
    }
    Ok(())
}

/// Where a partition begins.
pub(super) fn of(
    consumer: &Consumer,
    place: &Place,
    start: Start,
    begun: &mut Begun,
    limit: Duration,
) -> KafkaResult<Offset> {
    let mut list = TopicPartitionList::new();
    list.add_partition(&place.0, place.1);
    choose(consumer, &mut list, start, begun, limit)?;
    Ok(match list.elements().first().map(|element| element.offset()) {
        Some(at) if at != Offset::Invalid => at,
        _ => Offset::Stored,
    })
}

/// Those of which the group has committed nothing.
fn uncommitted(consumer: &Consumer, list: &TopicPartitionList, limit: Duration) -> KafkaResult<TopicPartitionList> {
    let mut new = TopicPartitionList::new();
    for element in consumer.committed_offsets(list.clone(), limit)?.elements() {
        element.error()?;
        if element.offset() == Offset::Invalid {
            new.add_partition(element.topic(), element.partition());
        }
    }
    Ok(new)
}

/// Whether the client has found nothing at the place where a partition goes on.
pub(super) fn is_lost(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset)
}

/// Where a partition goes on whose next message the brokers have no more.
pub(super) struct Found {
    pub(super) at: Offset,
    /// How many messages are missing, and why, if any are.
    pub(super) missed: Option<(u64, String)>,
}

/// Finds a place for a partition that has lost its own. `next` is the message that was to come, if that is known.
pub(super) fn find(
    consumer: &Consumer,
    (topic, partition): (&Topic, i32),
    next: Option<i64>,
    start: Start,
    begun: &mut Begun,
    limit: Duration,
) -> KafkaResult<Found> {
    let place = (topic.to_string(), partition);
    let next = match next {
        Some(next) => Some(next),
        None => {
            let mut list = TopicPartitionList::new();
            list.add_partition(&place.0, partition);
            let committed = consumer.committed_offsets(list, limit)?;
            match committed.elements().first() {
                Some(element) => {
                    element.error()?;
                    element.offset().to_raw().filter(|at| *at >= 0)
                }
                None => None,
            }
        }
    };
    let Some(next) = next else {
        let at = of(consumer, &place, start, begun, limit)?;
        return Ok(Found { at, missed: None });
    };
    let (low, high) = consumer.fetch_watermarks(topic.as_str(), partition, limit)?;
    let missed = match next {
        next if next < low => {
            let why = format!(
                "topic `{topic}`, partition {partition}, from offset {next} to {}: older or more than the topic keeps",
                low - 1
            );
            Some((low.abs_diff(next), why))
        }
        _ => {
            tracing::warn!(%topic, partition, offset = next, low, high, "the partition's messages begin again: it was truncated, or made anew");
            None
        }
    };
    Ok(Found {
        at: Offset::Offset(low),
        missed,
    })
}

/// Has the client go on from another place.
pub(super) fn place_again(consumer: &Consumer, place: &Place, at: Offset) -> KafkaResult<()> {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&place.0, place.1, at)?;
    // It does not seek in a partition that it has given up.
    consumer.incremental_unassign(&list)?;
    consumer.incremental_assign(&list)
}
