//! Topics: their declaration.

use crate::client::{Cluster, Quiet, off_thread};
use postrider_core::{Error, ErrorKind, GroupName, Result};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::Client,
    config::FromClientConfigAndContext as _,
    error::{KafkaResult, RDKafkaErrorCode},
    producer::{Producer as _, ThreadedProducer},
};
use rustc_hash::FxHashSet;
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// The topic of a group's dead letters.
pub(crate) fn dead_topic(group: &GroupName) -> String {
    format!("{group}.dead")
}

/// What brokers are asked with.
enum Asking {
    Admin(AdminClient<Quiet>),
    /// Admin clients never ask for a token: what declares nothing can do without one.
    Tokens(ThreadedProducer<Quiet>),
}

impl Asking {
    fn new(config: &ClientConfig, context: Quiet, by_token: bool) -> KafkaResult<Self> {
        match by_token {
            false => AdminClient::from_config_and_context(config, context).map(Self::Admin),
            true => ThreadedProducer::from_config_and_context(config, context).map(Self::Tokens),
        }
    }

    fn client(&self) -> &Client<Quiet> {
        match self {
            Self::Admin(admin) => admin.inner(),
            Self::Tokens(producer) => producer.client(),
        }
    }
}

/// Declares topics, or looks whether they are there; each once.
pub(crate) struct Topology {
    cluster: Cluster,
    known: Mutex<FxHashSet<String>>,
    asking: tokio::sync::OnceCell<Arc<Asking>>,
}

impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Topology")
            .field("known", &self.known)
            .finish_non_exhaustive()
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if let Some(asking) = self.asking.take() {
            // It waits for its thread.
            std::thread::spawn(move || drop(asking));
        }
    }
}

impl Topology {
    pub(crate) fn new(cluster: Cluster) -> Self {
        Self {
            cluster,
            known: Mutex::default(),
            asking: tokio::sync::OnceCell::new(),
        }
    }

    /// Those that have not been declared, or found, yet.
    pub(crate) fn unknown<'t>(&self, topics: impl Iterator<Item = &'t str>) -> Vec<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unknown: Vec<String> = Vec::new();
        let mut last = "";
        for topic in topics {
            if topic != last && !known.contains(topic) && !unknown.iter().any(|other| other == topic) {
                unknown.push(topic.to_owned());
            }
            last = topic;
        }
        unknown
    }

    /// What was declared may have been deleted since.
    pub(crate) fn forget(&self, topic: &str) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(topic);
    }

    /// Sees to it that these topics are there.
    ///
    /// # Errors
    /// With the kind `Config` for what stays wrong until somebody mends it.
    pub(crate) async fn ensure<'t>(&self, topics: impl Iterator<Item = &'t str>) -> Result<()> {
        let unknown = self.unknown(topics);
        if unknown.is_empty() {
            return Ok(());
        }
        let asking = self.asking.get_or_try_init(|| async {
            let config = self.cluster.with_properties(self.cluster.config());
            let quiet = Quiet(self.cluster.clone());
            let by_token = self.cluster.options().token().is_some();
            let made = off_thread(move || Asking::new(&config, quiet, by_token)).await?;
            made.map(Arc::new).map_err(self.cluster.failed("connecting"))
        });
        let asking = asking.await?.clone();
        let options = self.cluster.options();
        if let Asking::Admin(admin) = &*asking
            && options.declares
        {
            let new = |name| {
                let (partitions, replication, config) = options.of_topic(name);
                let replication = TopicReplication::Fixed(replication.unwrap_or(-1));
                let new = NewTopic::new(name, partitions, replication);
                config.iter().fold(new, |new, (name, value)| new.set(name, value))
            };
            let new: Vec<_> = unknown.iter().map(|name| new(name)).collect();
            let limits = AdminOptions::new()
                .request_timeout(Some(options.timeout))
                .operation_timeout(Some(options.timeout));
            let made = admin
                .create_topics(&new, &limits)
                .await
                .map_err(self.cluster.failed("declaring topics"))?;
            for outcome in made {
                match outcome {
                    Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                    // It may be there all the same.
                    Err((
                        name,
                        RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed,
                    )) => {
                        self.look_for(asking.clone(), name).await?;
                    }
                    Err((name, why)) => {
                        let kind = match why {
                            RDKafkaErrorCode::InvalidReplicationFactor
                            | RDKafkaErrorCode::InvalidPartitions
                            | RDKafkaErrorCode::InvalidConfig
                            | RDKafkaErrorCode::PolicyViolation
                            | RDKafkaErrorCode::InvalidTopic => ErrorKind::Config,
                            _ => ErrorKind::Conflict,
                        };
                        return Err(Error::new(kind, "a topic cannot be declared on Kafka")
                            .with("topic", name)
                            .because(why));
                    }
                }
            }
        } else {
            for name in &unknown {
                self.look_for(asking.clone(), name.clone()).await?;
            }
        }
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(unknown);
        Ok(())
    }

    /// How many partitions these topics have; of those that brokers do not tell of, as many as are declared.
    pub(crate) async fn partitions<'t>(&self, topics: impl Iterator<Item = &'t str>) -> usize {
        let (options, mut count) = (self.cluster.options(), 0);
        for topic in topics {
            let (asked, timeout) = (topic.to_owned(), options.timeout);
            let known = match self.asking.get().cloned() {
                Some(asking) => {
                    let found = off_thread(move || {
                        let metadata = asking.client().fetch_metadata(Some(&asked), timeout).ok()?;
                        metadata.topics().iter().map(|topic| topic.partitions().len()).max()
                    });
                    found.await.ok().flatten().filter(|partitions| *partitions > 0)
                }
                None => None,
            };
            count += known.unwrap_or(usize::try_from(options.of_topic(topic).0).unwrap_or(1));
        }
        count.max(1)
    }

    async fn look_for(&self, asking: Arc<Asking>, name: String) -> Result<()> {
        let (timeout, asked) = (self.cluster.options().timeout, name.clone());
        let found = off_thread(move || {
            let metadata = asking.client().fetch_metadata(Some(&asked), timeout)?;
            let topic = metadata.topics().iter().find(|topic| topic.name() == asked);
            Ok(topic.is_some_and(|topic| topic.error().is_none() && !topic.partitions().is_empty()))
        });
        match found.await?.map_err(self.cluster.failed("looking for a topic"))? {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Config,
                "the topic is missing on Kafka, and is not to be declared, or may not be",
            )
            .with("topic", name)),
        }
    }
}
