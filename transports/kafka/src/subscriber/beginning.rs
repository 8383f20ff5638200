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
use std::time::Duration;

/// Says in `list` where the partitions begin of which the group has committed nothing. Where that cannot be known just now, the client
/// looks for itself, and reports what it does not find.
pub(super) fn choose(consumer: &Consumer, list: &mut TopicPartitionList, start: Start, limit: Duration) {
    let chosen = uncommitted(consumer, list, limit).and_then(|mut new| {
        if let Start::At(time) = start {
            new.set_all_offsets(Offset::Offset(time.timestamp_millis()))?;
            new = consumer.offsets_for_times(new, limit)?;
        }
        for element in new.elements() {
            let at = match (start, element.offset()) {
                (Start::Earliest, _) => Offset::Beginning,
                // Nothing has been published since.
                (Start::At(_), at @ Offset::Offset(_)) => at,
                (Start::At(_) | Start::Latest, _) => Offset::End,
            };
            list.set_partition_offset(element.topic(), element.partition(), at)?;
        }
        Ok(())
    });
    if let Err(error) = chosen {
        tracing::debug!(%error, "what the group has committed cannot be known just now");
    }
}

/// Where a partition begins.
pub(super) fn of(consumer: &Consumer, place: &Place, start: Start, limit: Duration) -> Offset {
    let mut list = TopicPartitionList::new();
    list.add_partition(&place.0, place.1);
    choose(consumer, &mut list, start, limit);
    match list.elements().first().map(|element| element.offset()) {
        Some(at) if at != Offset::Invalid => at,
        _ => Offset::Stored,
    }
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
    limit: Duration,
) -> KafkaResult<Found> {
    let mut list = TopicPartitionList::new();
    list.add_partition(topic.as_str(), partition);
    let next = match next {
        Some(next) => Some(next),
        None => match consumer.committed_offsets(list.clone(), limit)?.elements().first() {
            Some(element) => element.offset().to_raw().filter(|at| *at >= 0),
            None => None,
        },
    };
    let Some(next) = next else {
        let at = match of(consumer, &(topic.to_string(), partition), start, limit) {
            Offset::Stored => Offset::Beginning,
            at => at,
        };
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
