//! The members of a group: what each handles, so that none acknowledges what another would handle.
//!
//! A member registers its event types and topics in the log before it joins the group, and asks for the others when it meets
//! a type it lacks. A registration counts for a day after it was last renewed: through a rolling deploy, and a restart.

use super::shared::Shared;
use crate::{
    GroupName, Message, Result, Topic,
    clock::Clock,
    health::{PartState, Status, Trouble},
    log::{GroupMember, InboxLog, RegisteredMember},
    relay::TopicPattern,
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// How long a registration counts after it was last renewed.
pub(super) const RETENTION: Duration = Duration::from_secs(24 * 3600);
/// Between renewals.
const RENEWAL: Duration = Duration::from_secs(20);
/// A member that has not renewed its registration for so long is not running.
const ALIVE: Duration = Duration::from_secs(60);
/// Members that disagree about their types for longer than this are no rolling deploy.
const DEPLOY: Duration = Duration::from_secs(15 * 60);

/// Who in the group handles a type that this member lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    /// A member that is running.
    Running,
    /// A member that was, within a day.
    Recent,
    /// Nobody.
    Nobody {
        /// Whether some member has asked for the topic.
        is_wanted: bool,
    },
}

/// The members of a group, as one of them sees the others.
#[derive(Debug)]
pub(super) struct Members {
    inbox: Arc<dyn InboxLog>,
    group: GroupName,
    me: GroupMember,
    topics: Vec<TopicPattern>,
    /// Counts the questions.
    asked: AtomicU64,
    known: tokio::sync::Mutex<Known>,
}

/// The answer to the questions before `covers`.
#[derive(Debug, Default)]
struct Known {
    covers: u64,
    members: Vec<RegisteredMember>,
}

impl Members {
    pub(super) fn new(inbox: Arc<dyn InboxLog>, group: GroupName, me: GroupMember, topics: Vec<TopicPattern>) -> Self {
        Self {
            inbox,
            group,
            me,
            topics,
            asked: AtomicU64::new(0),
            known: tokio::sync::Mutex::default(),
        }
    }

    /// Registers this member, or renews its registration. Every other member sees it from then on.
    pub(super) async fn register(&self) -> Result<()> {
        self.inbox.register(&self.group, &self.me, RETENTION).await
    }

    /// Whether this member has asked for the topic.
    pub(super) fn asks_for(&self, topic: &Topic) -> bool {
        self.topics.iter().any(|pattern| pattern.matches(topic))
    }

    /// The members as they are registered now, or after the question was asked: many questions at once share one answer.
    async fn now(&self) -> Result<Vec<RegisteredMember>> {
        let ticket = self.asked.fetch_add(1, Ordering::AcqRel);
        let mut known = self.known.lock().await;
        if known.covers <= ticket {
            let covers = self.asked.load(Ordering::Acquire);
            let members = self.inbox.members(&self.group, RETENTION).await?;
            *known = Known { covers, members };
        }
        Ok(known.members.clone())
    }

    /// Who else handles the type of a message that this member lacks.
    pub(super) async fn who_handles(&self, message: &Message) -> Result<Who> {
        let members = self.now().await?;
        let others = members.iter().filter(|known| known.member.owner != self.me.owner);
        let handlers = others.filter(|known| known.member.types.iter().any(|kind| *kind == message.kind()));
        let freshest = handlers.map(|known| known.unseen_for).min();
        Ok(match freshest {
            Some(unseen) if unseen < ALIVE => Who::Running,
            Some(_) => Who::Recent,
            None => Who::Nobody {
                is_wanted: members.iter().any(|known| asks_for(&known.member, message.topic())),
            },
        })
    }

    /// Whether another running member handles all that this one does, and more: then the inbox is better left to it.
    pub(super) async fn is_outdone(&self) -> bool {
        let mine: BTreeSet<&str> = self.me.types.iter().map(String::as_str).collect();
        let Ok(members) = self.now().await else { return false };
        let others = members.iter().filter(|known| known.member.owner != self.me.owner);
        others.filter(|known| known.unseen_for < ALIVE).any(|known| {
            let theirs: BTreeSet<&str> = known.member.types.iter().map(String::as_str).collect();
            theirs.len() > mine.len() && theirs.is_superset(&mine)
        })
    }

    /// Renews the registration until `stop`, and looks whether the members agree.
    pub(super) async fn keep_registered(&self, clock: &dyn Clock, status: &Status, stop: &CancellationToken) {
        while stop.run_until_cancelled(clock.sleep(RENEWAL)).await.is_some() {
            let Some(registered) = stop.run_until_cancelled(self.register()).await else {
                return;
            };
            if let Err(error) = registered {
                tracing::debug!(group = %self.group, error = error.to_chain(), "the registration of a member was not renewed");
                continue;
            }
            let Some(members) = stop.run_until_cancelled(self.now()).await else {
                return;
            };
            match members.ok().and_then(|members| self.disagreement(&members)) {
                Some(text) => {
                    if status.has(Trouble::Members).is_none() {
                        tracing::warn!(group = %self.group, "{text}");
                    }
                    let fix = "let all members of a group run one version of the program, or give each its own group";
                    status.raise(Trouble::Members, PartState::Degraded, text, Some(fix));
                }
                None => {
                    status.clear(Trouble::Members);
                }
            }
        }
    }

    fn disagreement(&self, members: &[RegisteredMember]) -> Option<String> {
        let me = members.iter().find(|known| known.member.owner == self.me.owner)?;
        let mine: BTreeSet<&String> = self.me.types.iter().collect();
        let is_old = |known: &&RegisteredMember| known.registered_for.min(me.registered_for) > DEPLOY;
        let others = members.iter().filter(|known| known.unseen_for < ALIVE).filter(is_old);
        let other = others
            .map(|known| known.member.types.iter().collect::<BTreeSet<_>>())
            .find(|theirs| *theirs != mine)?;
        let differ: Vec<&str> = mine.symmetric_difference(&other).map(|kind| kind.as_str()).collect();
        Some(format!(
            "members of the group have handled different event types for over {} minutes: not all handle {}",
            DEPLOY.as_secs() / 60,
            differ.join(", ")
        ))
    }
}

fn asks_for(member: &GroupMember, topic: &Topic) -> bool {
    let patterns = member
        .topics
        .iter()
        .filter_map(|text| TopicPattern::parse(text.as_str()).ok());
    patterns.into_iter().any(|pattern| pattern.matches(topic))
}

impl Shared {
    /// Asks the members who handles a message that this one lacks the type of; `None` if the subscription was stopped before
    /// the log answered.
    pub(super) async fn who_handles(&self, members: &Members, message: &Message) -> Option<Who> {
        loop {
            match members.who_handles(message).await {
                Ok(who) => {
                    self.gate.log_is_back();
                    return Some(who);
                }
                Err(error) => {
                    tracing::warn!(group = %self.group, error = error.to_chain(), "the members of the group cannot be looked up, it will be tried again");
                    self.gate.log_is_away(error.to_chain());
                }
            }
            let pause = self.tools.clock.sleep(super::inbox::PAUSE);
            self.stop.run_until_cancelled(pause).await?;
        }
    }
}
