//! Random histories against what is promised.

use super::{
    Desk, LogFixture,
    fixture::{SHORT, name},
    message,
};
use postrider_core::log::{Claim, NewRecord, Outcome, Owner, Parking, Record, SessionOptions, Settled, Until};
use std::{collections::HashMap, time::Duration};

/// A small generator, so that a failing history replays from its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }
}

/// Appends, claims, refusals, releases, deaths of the holder and the passing of time, at random: at the end everything
/// was done once, and each key's records were first attempted in the order they were appended in.
pub async fn random_histories_lose_nothing_and_keep_order(fixture: &dyn LogFixture) {
    let (mut appended, mut next) = (0_u64, HashMap::<String, u64>::new());
    let mut first_attempts: HashMap<String, Vec<u64>> = HashMap::new();
    let mut done: HashMap<String, u32> = HashMap::new();
    let options = || SessionOptions::new(Owner::new()).with_lease(SHORT);
    for seed in 0..4 {
        let mut dice = Dice(seed);
        let mut desk = Desk::with(fixture, fixture.log(), options()).await;
        let mut held: Vec<Record> = Vec::new();
        for _ in 0..150 {
            match dice.roll(12) {
                0..4 => {
                    let batch: Vec<NewRecord> = (0..=dice.roll(6))
                        .map(|_| {
                            let key = format!("k{}", dice.roll(5));
                            let n = next.entry(key.clone()).or_default();
                            *n += 1;
                            appended += 1;
                            NewRecord::new(message("t", Some(&key), &format!("{key}/{n}")))
                        })
                        .collect();
                    desk.append(&batch).await;
                }
                4..7 => {
                    let most = 1 + dice.roll(8);
                    let claimed = desk.claim(usize::try_from(most).unwrap_or(1)).await.records;
                    held.extend(claimed);
                }
                7..11 if !held.is_empty() => {
                    // As an engine does: of each key the first in hand is attempted, and those behind a refusal go back.
                    let key = held[usize::try_from(dice.roll(held.len() as u64)).unwrap_or(0)]
                        .message
                        .key()
                        .unwrap_or("")
                        .to_owned();
                    let (of_key, rest): (Vec<_>, Vec<_>) =
                        held.into_iter().partition(|r| r.message.key() == Some(&key));
                    held = rest;
                    let first = &of_key[0];
                    attempted(&mut first_attempts, first);
                    let refused = dice.roll(3) == 0;
                    let outcome = if refused {
                        desk.parked(Duration::from_millis(200 * dice.roll(10)))
                    } else {
                        Outcome::Done
                    };
                    let mut outcomes = vec![(first, outcome)];
                    if refused || dice.roll(4) == 0 {
                        outcomes.extend(of_key[1..].iter().map(|r| (r, Outcome::Released)));
                    } else {
                        held.extend_from_slice(&of_key[1..]);
                    }
                    let report = desk.settle(outcomes).await;
                    if !refused && !report.lost.contains(&first.tag) {
                        *done.entry(name(&first.message)).or_default() += 1;
                    }
                }
                11 => {
                    // The holder dies; another follows when the lease is over.
                    held.clear();
                    desk = Desk::with(fixture, fixture.other().await, options()).await;
                    desk.claim(0).await;
                    fixture.advance(SHORT * 2).await;
                }
                _ => fixture.advance(Duration::from_millis(100)).await,
            }
        }
        drop(held);
        desk.session.close().await.unwrap();
    }
    let last = Desk::with(fixture, fixture.log(), options()).await;
    for _ in 0..20_000 {
        if done.len() as u64 == appended {
            break;
        }
        let records = last.take().await;
        if records.is_empty() {
            fixture.advance(Duration::from_millis(300)).await;
            continue;
        }
        records.iter().for_each(|r| attempted(&mut first_attempts, r));
        let report = last.settle(records.iter().map(|r| (r, Outcome::Done)).collect()).await;
        for record in records.iter().filter(|r| !report.lost.contains(&r.tag)) {
            *done.entry(name(&record.message)).or_default() += 1;
        }
    }
    assert_eq!(done.len() as u64, appended, "nothing is lost");
    assert!(done.values().all(|times| *times == 1), "nothing is done twice");
    for (key, order) in first_attempts {
        assert!(order.is_sorted(), "{key}: {order:?}");
    }
}

/// An engine claims while it settles. Whatever comes between the two, a key's records are first attempted in order.
pub async fn calls_overlap_and_keys_keep_their_order(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let mut dice = Dice(7);
    let mut first_attempts: HashMap<String, Vec<u64>> = HashMap::new();
    let (mut appended, mut next) = (0_u64, HashMap::<String, u64>::new());
    let mut done = 0_u64;
    // Of each key what is in hand, in order, and whether the first is parked and kept.
    let mut in_hand: HashMap<String, (Vec<Record>, bool)> = HashMap::new();
    let mut quiet = 0;
    for step in 0..3000 {
        if step < 250 {
            let batch: Vec<NewRecord> = (0..=dice.roll(8))
                .map(|_| {
                    let key = format!("k{}", dice.roll(4));
                    let n = next.entry(key.clone()).or_default();
                    *n += 1;
                    appended += 1;
                    NewRecord::new(message("t", Some(&key), &format!("{key}/{n}")))
                })
                .collect();
            desk.append(&batch).await;
        }
        let mut outcomes = Vec::new();
        let mut keys: Vec<String> = in_hand.keys().cloned().collect();
        keys.sort();
        for key in keys {
            if dice.roll(4) == 0 {
                continue;
            }
            let Some((records, kept)) = in_hand.remove(&key) else {
                continue;
            };
            attempted(&mut first_attempts, &records[0]);
            let tag = |record: &Record| record.tag;
            match dice.roll(5) {
                // Refused: it stays in hand, and those behind it go back.
                0 | 1 if step < 400 => {
                    let parking = Parking::new(Until::After(Duration::from_millis(200)), 1, Vec::new()).kept();
                    outcomes.push((tag(&records[0]), Outcome::Parked(parking)));
                    outcomes.extend(records[1..].iter().map(|r| (tag(r), Outcome::Released)));
                    in_hand.insert(key, (records[..1].to_vec(), true));
                }
                // Refused once more, and left to its time.
                2 if kept && step < 400 => {
                    let parking = Parking::new(Until::After(Duration::ZERO), 2, Vec::new());
                    outcomes.push((tag(&records[0]), Outcome::Parked(parking)));
                    outcomes.extend(records[1..].iter().map(|r| (tag(r), Outcome::Released)));
                }
                _ => {
                    outcomes.push((tag(&records[0]), Outcome::Done));
                    done += 1;
                    if records.len() > 1 {
                        in_hand.insert(key, (records[1..].to_vec(), false));
                    }
                }
            }
        }
        let settled: Vec<Settled> = outcomes
            .into_iter()
            .map(|(tag, outcome)| Settled { tag, outcome })
            .collect();
        let request = Claim::new(1 + usize::try_from(dice.roll(12)).unwrap_or(0));
        let (claimed, report) = tokio::join!(desk.session.claim(&request), desk.session.settle(&settled));
        assert!(report.unwrap().lost.is_empty());
        let claimed = claimed.unwrap().records;
        quiet = if claimed.is_empty() && settled.is_empty() {
            quiet + 1
        } else {
            0
        };
        for record in claimed {
            let key = record.message.key().unwrap_or_default().to_owned();
            in_hand.entry(key).or_default().0.push(record);
        }
        if step >= 250 && done == appended {
            break;
        }
        if quiet > 3 {
            fixture.advance(Duration::from_millis(300)).await;
        }
    }
    assert_eq!(done, appended, "everything was done");
    for (key, order) in first_attempts {
        assert!(order.is_sorted(), "{key}: {order:?}");
    }
}

fn attempted(first_attempts: &mut HashMap<String, Vec<u64>>, record: &Record) {
    let name = name(&record.message);
    let (key, n) = name.split_once('/').unwrap_or((&name, "0"));
    let n: u64 = n.parse().unwrap_or(0);
    let order = first_attempts.entry(key.to_owned()).or_default();
    if !order.contains(&n) {
        order.push(n);
    }
}
