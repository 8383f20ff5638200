//! The conformance suites that an event log or a transport of Postrider has to pass.
//!
//! A behaviour is one `async fn`; [`log_conformance!`] and [`transport_conformance!`] make one visible test of each. A
//! backend's own test file says how to make a fresh one, and is about ten lines:
//!
//! ```
//! # use postrider_testkit::{log_conformance, log::ClockedLog};
//! # use postrider_core::memory::MemoryLog;
//! log_conformance!(ClockedLog::new(|clock| async move { MemoryLog::on_clock(clock).into() }).await);
//! # fn main() {}
//! ```

// A suite fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::mem_forget)]

pub mod log;
mod quiet;
#[cfg(unix)]
pub mod server;
pub mod transport;

/// One test for each behaviour a log has to show; the argument is an expression that makes a fresh
/// [`LogFixture`](log::LogFixture), evaluated for each test in an async context.
#[macro_export]
macro_rules! log_conformance {
    ($fixture:expr) => {
        $crate::log_conformance!(@each $fixture;
            append_claim_settle_round_trip
            rollback_leaves_nothing
            claims_are_exclusive
            an_expired_lease_is_taken_over
            a_stale_settle_changes_nothing
            a_live_lease_is_renewed
            due_times_are_kept
            never_is_a_time_like_any_other
            nothing_waiting_stops_a_neighbour
            a_busy_key_is_passed_over_and_given_later
            a_backlog_of_one_key_hinders_no_other
            a_long_run_waits_behind_its_head_in_order
            order_survives_failure
            a_key_waits_for_whatever_is_parked_of_it
            order_survives_a_take_over
            keyless_records_are_not_held_back
            released_records_keep_their_place
            a_parked_record_is_settled_again
            a_record_parked_on_arrival_keeps_its_place
            a_topic_is_resumed
            topics_that_wait_are_told_to_the_next_holder
            failed_records_are_redriven_and_discarded
            a_redriven_record_may_be_refused_again
            a_redriven_record_lets_nothing_overtake
            a_redriven_record_lets_nothing_overtake_after_a_take_over
            a_failed_record_can_hold_its_key
            a_record_that_failed_on_arrival_can_hold_its_key
            parked_and_failed_are_unique
            retries_do_not_starve_what_is_new
            what_succeeded_is_kept_only_if_asked
            purge_is_bounded_and_takes_only_what_is_due
            bytes_come_back_as_they_were
            an_append_after_a_cancelled_begin_is_durable
            errors_are_kept_the_last_ten
            stats_count
            pages_are_stable_under_writes
            mailboxes_are_known_by_name
            close_hands_over_at_once
            a_wait_ends_with_news_or_with_its_time
            mailboxes_are_apart
            messages_are_admitted_once
            admission_knows_what_waits
            a_look_writes_nothing
            notes_are_compared_and_set
            notes_are_kept_while_their_message_waits
            members_know_each_other
            a_savepoint_undoes_a_part
            claims_are_bounded_by_bytes
            random_histories_lose_nothing_and_keep_order
            calls_overlap_and_keys_keep_their_order
        );
    };
    (@each $fixture:expr; $($name:ident)*) => {$(
        #[test]
        fn $name() {
            $crate::run(async { $crate::log::$name(&$fixture).await });
        }
    )*};
}

/// One test for each behaviour a transport has to show; the argument is an expression that makes a fresh
/// [`TransportFixture`](transport::TransportFixture), evaluated for each test in an async context.
///
/// Whatever the process logs at WARN or above meanwhile fails the tests that run: have nothing else in the same file, and install
/// no logger or subscriber.
#[macro_export]
macro_rules! transport_conformance {
    ($fixture:expr) => {
        $crate::transport_conformance!(@each $fixture;
            every_message_once_to_each_group
            content_is_intact
            what_is_retried_comes_back
            what_is_released_comes_back_in_order
            unsettled_comes_back
            order_per_key
            order_per_key_through_a_member_that_dies
            order_per_key_while_another_member_looks
            competing_consumers_share
            members_share_the_partitions
            a_late_subscriber_gets_what_waited
            what_is_published_to_a_declared_group_waits_for_it
            a_broadcast_reaches_every_member
            a_pattern_takes_every_topic_that_matches
            concurrent_close_loses_nothing
            a_closed_feed_says_so
            a_second_settle_is_an_error
            dead_letters_do_not_come_back
            undeclared_is_refused
            each_message_has_one_outcome
            a_rolling_deploy_loses_nothing
            publishing_nothing_is_fine
        );
    };
    (@each $fixture:expr; $($name:ident)*) => {$(
        #[test]
        fn $name() {
            let longest = std::time::Duration::from_secs(180);
            $crate::run_quietly(longest, async { $crate::transport::$name(&$fixture).await });
        }
    )*};
}

/// One test for each behaviour a transport has to show while its broker is away; the arguments are the
/// [`Server`](transport::Server), of which each test starts its own, a function of a reference to it that makes the transport,
/// and attributes that the tests get.
#[cfg(unix)]
#[macro_export]
macro_rules! transport_outages {
    ($server:ty, $transport:expr $(, #[$attribute:meta])*) => {
        $crate::transport_outages!(@each [$(#[$attribute])*] $server, $transport;
            start what_was_confirmed_outlives_the_broker
            behind_proxy what_was_confirmed_outlives_its_connection
            start a_feed_outlives_the_broker
            start a_broker_that_stands_still_is_told
        );
    };
    (@each $attributes:tt $server:ty, $transport:expr; $($start:ident $name:ident)*) => {$(
        $crate::transport_outages!(@one $attributes $server, $transport; $start $name);
    )*};
    (@one [$(#[$attribute:meta])*] $server:ty, $transport:expr; $start:ident $name:ident) => {
        #[test]
        $(#[$attribute])*
        fn $name() {
            let server = <$server as $crate::transport::Server>::$start();
            let transport = $transport(&server);
            let longest = std::time::Duration::from_secs(240);
            $crate::run_within(longest, $crate::transport::$name(server, transport));
        }
    };
}

/// Runs a test on a runtime of two threads, for at most a minute.
#[doc(hidden)]
pub fn run(test: impl Future<Output = ()>) {
    run_within(std::time::Duration::from_secs(60), test);
}

/// As [`run_within`], and fails if anything is logged at WARN or above.
#[doc(hidden)]
pub fn run_quietly(limit: std::time::Duration, test: impl Future<Output = ()>) {
    quiet::quietly(|| run_within(limit, test));
}

/// Runs a test on a runtime of two threads, for at most `limit`.
#[doc(hidden)]
#[allow(clippy::expect_used)]
pub fn run_within(limit: std::time::Duration, test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime can be built");
    let in_time = runtime.block_on(async { tokio::time::timeout(limit, test).await });
    assert!(in_time.is_ok(), "the test did not end within {limit:?}");
}
