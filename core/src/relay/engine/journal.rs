//! What goes to the log and comes from it: claims, settles, resumed topics.

use super::{Engine, Event, SHORTEST_POLL, attempt::tell};
use crate::{
    Error, Result, Topic,
    clock::Moment,
    log::{AttemptError, Claim, Claimed, Outcome, RecordTag, SettleReport, Settled, Stored},
    relay::{Reporter, outage::Probing},
};
use std::time::Duration;

impl Engine {
    pub(super) fn settle(&mut self, tag: RecordTag, outcome: Outcome) {
        self.settling.push(Settled { tag, outcome });
    }

    /// Settles a record that was parked before, and whose parking may not be written yet: then this takes its place,
    /// since a batch names a record once.
    pub(super) fn settle_again(&mut self, tag: RecordTag, mut outcome: Outcome) {
        if let Some(at) = self.settling.iter().position(|settled| settled.tag == tag) {
            let before = self.settling.remove(at);
            if let (Outcome::Parked(before), Some(errors)) = (before.outcome, errors_of(&mut outcome)) {
                errors.splice(0..0, before.errors);
            }
        }
        self.settle(tag, outcome);
    }

    /// One settle at a time: what comes meanwhile goes with the next, and settles take effect in order.
    pub(super) fn start_settle(&mut self) {
        if self.is_settling || self.settling.is_empty() {
            return;
        }
        self.is_settling = true;
        let batch = std::mem::take(&mut self.settling);
        self.being_settled = batch.len();
        let session = self.session.clone();
        self.job(async move {
            let result = session.settle(&batch).await;
            Event::Settled { batch, result }
        });
    }

    pub(super) fn settled(&mut self, batch: Vec<Settled>, result: Result<SettleReport>, now: Moment) {
        self.is_settling = false;
        self.being_settled = 0;
        match result {
            Ok(report) => {
                self.log_answered();
                if !report.lost.is_empty() {
                    Reporter::count(&self.reporter.lost, report.lost.len());
                    tracing::warn!(mailbox = %self.mailbox, records = report.lost.len(), "records were not settled: their lease is lost, others may publish them once more");
                }
                if !self.unwritten.is_empty() {
                    batch.iter().for_each(|settled| {
                        self.unwritten.remove(&settled.tag);
                    });
                }
                self.follow_written(&batch);
                self.tell_of_exhausted(&report.lost);
                self.wants_claim |= report.may_claim;
            }
            Err(error) => {
                self.log_failed(&error, now);
                if self.lease.is_held() {
                    let newer = std::mem::replace(&mut self.settling, batch);
                    for settled in newer {
                        self.settle_again(settled.tag, settled.outcome);
                    }
                }
            }
        }
    }

    /// Those behind what is now stored may be sent.
    fn follow_written(&mut self, batch: &[Settled]) {
        // Without the lease they are forgotten with all the others.
        if self.behind_unwritten.is_empty() || !self.lease.is_held() {
            return;
        }
        for settled in batch {
            let next = self.behind_unwritten.remove(&settled.tag);
            self.follow(next);
        }
    }

    /// Tells the callback of what is now stored as failed, with all the errors the log has kept.
    fn tell_of_exhausted(&mut self, lost: &[RecordTag]) {
        let Some(callback) = self.options.on_exhausted.clone() else {
            return;
        };
        let settled: Vec<Stored> = {
            let still = |tag: &RecordTag| self.settling.iter().any(|s| s.tag == *tag);
            let (waiting, settled) = std::mem::take(&mut self.exhausted)
                .into_iter()
                .partition(|(tag, _)| still(tag));
            self.exhausted = waiting;
            let settled: Vec<(RecordTag, Stored)> = settled;
            settled
                .into_iter()
                .filter(|(tag, _)| !lost.contains(tag))
                .map(|(_, failed)| failed)
                .collect()
        };
        if settled.is_empty() {
            return;
        }
        let (admin, mailbox) = (self.log.admin().ok().cloned(), self.mailbox.clone());
        self.job(async move {
            for failed in settled {
                let stored = match &admin {
                    Some(admin) => admin.show(&mailbox, failed.message.id()).await.ok().flatten(),
                    None => None,
                };
                tell(&callback, stored.as_ref().unwrap_or(&failed));
            }
            Event::Told
        });
    }

    pub(super) fn start_claim(&mut self) {
        if !self.wants_claim || self.is_claiming {
            return;
        }
        // What waits in the local tier, or for a silent topic, keeps no room from the others.
        let apart = self.flights.silent() + self.local.len();
        let held = (self.in_hand.len() + self.settling.len() + self.being_settled).saturating_sub(apart);
        let room = self.options.max_in_flight.saturating_sub(held);
        // Small claims cost as much as large ones: wait for half a batch of room.
        let apart = self.flights.silent_bytes() + self.local_bytes;
        let in_hand = self.in_hand.bytes().saturating_sub(apart);
        let bytes = self.options.max_in_flight_bytes.saturating_sub(in_hand);
        if room < self.options.batch_size.div_ceil(2) || bytes == 0 {
            return;
        }
        self.is_claiming = true;
        self.wants_claim = false;
        let asked = room.min(self.options.batch_size);
        let request = Claim::new(asked).with_max_parked(self.options.retry_batch);
        let request = request.with_max_bytes(bytes);
        let session = self.session.clone();
        self.job(async move {
            let result = session.claim(&request).await;
            Event::Claimed {
                asked: (asked, bytes),
                result,
            }
        });
    }

    /// What a claim gave that asked for so many records and bytes.
    pub(super) fn claimed(&mut self, asked: (usize, usize), result: Result<Claimed>, now: Moment) {
        self.is_claiming = false;
        let claimed = match result {
            Ok(claimed) => claimed,
            Err(error) => {
                self.log_failed(&error, now);
                self.wants_claim = true;
                return;
            }
        };
        self.log_answered();
        if !claimed.lease.is_same(&self.lease) {
            // Once lost, what is left is with the client, with those behind it: nothing to lose again at each claim.
            if self.has_lease && (self.in_hand.len() > self.in_flight || !self.settling.is_empty()) {
                self.lose_lease();
            } else {
                self.tenure += 1;
                self.destinations.clear();
                self.tell_topics_away();
            }
            self.lease = claimed.lease;
            self.has_lease = self.lease.is_held();
        }
        for topic in claimed.waiting {
            tracing::info!(%topic, "records wait for this topic: it will be probed");
            self.destinations.found_waiting(topic, now);
        }
        let given = claimed.records.len();
        if given > 0 {
            self.idle_floor = Duration::ZERO;
        }
        Reporter::count(&self.reporter.claimed, given);
        let bytes: usize = claimed.records.iter().map(|r| r.message.payload().len()).sum();
        self.wants_claim |= given >= asked.0 || bytes >= asked.1;
        self.claimed_at = now;
        self.due_at = self.next_poll(given, claimed.next_due).map(|wait| now + wait);
        self.line_up(claimed.records);
        if given == 0 {
            self.is_idle_again();
        }
        if self.is_stopping {
            self.stop();
        }
    }

    /// How long until something is due, or a commit is looked for that nobody will tell of.
    fn next_poll(&mut self, given: usize, next_due: Option<Duration>) -> Option<Duration> {
        if given > 0 {
            self.quick_poll = None;
        }
        if let Some(quick) = self.quick_poll {
            let next = quick.saturating_mul(2);
            self.quick_poll = (next < self.options.poll_interval).then_some(next);
        }
        let next = next_due.into_iter().chain(self.quick_poll).min();
        next.map(|wait| wait.max(SHORTEST_POLL))
    }

    /// Asks the log for the probe of a paused topic, or for more records of one that is back.
    pub(super) fn start_resume(&mut self, now: Moment) {
        if self.is_resuming {
            return;
        }
        let unwritten = &self.unwritten;
        let is_written = |topic: &Topic| unwritten.is_empty() || !unwritten.values().any(|other| other == topic);
        let probe = self.destinations.ask_for_probe(now, is_written).map(|topic| (topic, 1));
        let batch_size = self.options.batch_size;
        let back = self.destinations.resuming.iter().position(is_written);
        // Taken off the list: whatever puts it there from now on is news that this answer does not know of.
        let Some((topic, asked)) = probe.or_else(|| Some((self.destinations.resuming.remove(back?), batch_size)))
        else {
            return;
        };
        self.is_resuming = true;
        let session = self.session.clone();
        self.job(async move {
            let result = session.resume(&topic, asked).await;
            Event::Resumed { topic, asked, result }
        });
    }

    pub(super) fn resumed(&mut self, topic: &Topic, asked: usize, result: Result<u64>, now: Moment) {
        self.is_resuming = false;
        let found = match result {
            Ok(found) => found,
            Err(error) => {
                self.destinations.resume(topic);
                return self.log_failed(&error, now);
            }
        };
        self.log_answered();
        self.wants_claim |= found > 0;
        // What was parked meanwhile is still to be written: then it is asked once more.
        let is_unwritten = self.unwritten.values().any(|other| other == topic);
        if is_unwritten || (found as usize) >= asked {
            self.destinations.resume(topic);
        }
        // Nothing of it waits: whatever comes next finds out for itself whether the destination is back.
        if found == 0 && !is_unwritten && self.in_flight == 0 && self.destinations.forget_asked(topic) {
            self.tell_topics_away();
        }
    }

    fn log_failed(&mut self, error: &Error, now: Moment) {
        if self.log_retry_at.is_none() {
            tracing::warn!(mailbox = %self.mailbox, error = error.to_chain(), "the event log failed: it will be tried again");
        }
        self.reporter.log_away(Some(error.to_chain()));
        self.log_retry_at = Some(now + self.log_probing.next(&mut self.rng));
    }

    fn log_answered(&mut self) {
        if self.log_retry_at.take().is_some() {
            tracing::info!(mailbox = %self.mailbox, "the event log is back");
            self.log_probing = Probing::new(self.options.max_probe_interval);
            self.reporter.log_away(None);
        }
    }
}

fn errors_of(outcome: &mut Outcome) -> Option<&mut Vec<AttemptError>> {
    match outcome {
        Outcome::Parked(parking) => Some(&mut parking.errors),
        Outcome::Failed { errors, .. } => Some(errors),
        _ => None,
    }
}
