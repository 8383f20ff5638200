//! Connecting.

use crate::config::{RabbitMqOptions, without_password};
use lapin::{
    Channel, ConnectionProperties,
    tcp::OwnedTLSConfig,
    uri::{AMQPScheme, AMQPUri},
};
use postrider_core::{Error, ErrorKind, Result, subscriber::QueueOptions};
use std::{
    ops::Deref,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Where the broker is, and how to talk to it.
#[derive(Debug, Clone)]
pub(crate) struct Broker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: RabbitMqOptions,
    queue: QueueOptions,
    uri: Hidden,
    tls: HiddenTls,
}

/// Not shown: it holds a password.
struct Hidden(AMQPUri);
struct HiddenTls(Option<String>);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}
impl std::fmt::Debug for HiddenTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

impl Broker {
    pub(crate) fn new(options: RabbitMqOptions) -> Result<Self> {
        Self::with_queue(options, QueueOptions::default())
    }

    fn with_queue(options: RabbitMqOptions, queue: QueueOptions) -> Result<Self> {
        let mut uri: AMQPUri = options.url.parse().map_err(|why: String| {
            Error::new(
                ErrorKind::Config,
                "the address of RabbitMQ cannot be read: amqp://user:password@host:5672/vhost",
            )
            .with("url", without_password(&options.url))
            .because(why.replace(&options.url, "…"))
        })?;
        // What the address says counts, where nothing else is said.
        if uri.query.heartbeat.is_none() || options.heartbeat != RabbitMqOptions::default().heartbeat {
            uri.query.heartbeat = Some(u16::try_from(options.heartbeat.as_secs()).unwrap_or(u16::MAX));
        }
        uri.query.connection_timeout = Some(u64::try_from(options.timeout.as_millis()).unwrap_or(u64::MAX));
        let tls = match &options.ca_file {
            None => None,
            Some(file) if uri.scheme != AMQPScheme::AMQPS => {
                return Err(Error::new(
                    ErrorKind::Config,
                    "certificates to trust are given, but the address is not one of TLS: amqps://",
                )
                .with("ca_file", file.display()));
            }
            Some(file) => Some(std::fs::read_to_string(file).map_err(|why| {
                Error::new(ErrorKind::Config, "the certificates to trust cannot be read")
                    .with("ca_file", file.display())
                    .because(why)
            })?),
        };
        Ok(Self(Arc::new(Inner {
            options,
            queue,
            uri: Hidden(uri),
            tls: HiddenTls(tls),
        })))
    }

    /// The same, for a group that asks for something else of its queue.
    pub(crate) fn for_queue(&self, queue: &QueueOptions) -> Result<Self> {
        if queue == &QueueOptions::default() {
            return Ok(self.clone());
        }
        let mut options = self.0.options.clone();
        options.exchange = queue.bind.clone().unwrap_or(options.exchange);
        options.declares = queue.declare.unwrap_or(options.declares);
        Self::with_queue(options, queue.clone())
    }

    /// What a group asks of its queue.
    pub(crate) fn queue(&self) -> &QueueOptions {
        &self.0.queue
    }

    pub(crate) fn options(&self) -> &RabbitMqOptions {
        &self.0.options
    }

    /// A connection for `what`, which its name says.
    pub(crate) async fn connect(&self, what: &str) -> Result<Connection> {
        let failed = |why: lapin::Error| {
            let text = match why.kind() {
                lapin::ErrorKind::ProtocolError(_) => {
                    "RabbitMQ refuses the connection: user, password, or virtual host"
                }
                _ => "RabbitMQ cannot be reached",
            };
            Error::new(ErrorKind::Unavailable, text)
                .with("url", without_password(&self.options().url))
                .because(why)
        };
        let name = format!("{} {what}", self.options().connection_name);
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let tls = OwnedTLSConfig {
            identity: None,
            cert_chain: self.0.tls.0.clone(),
        };
        let runtime = lapin::runtime::default_runtime()
            .map_err(|why| Error::new(ErrorKind::Unexpected, "RabbitMQ's client needs a tokio runtime").because(why))?;
        let connect = lapin::Connection::connect_uri_with_config(self.0.uri.0.clone(), properties, tls, runtime);
        let client = self
            .in_time("connecting", async { connect.await.map_err(failed) })
            .await?;
        Ok(Connection {
            client: Arc::new(client),
            channels: Mutex::default(),
        })
    }

    /// Runs `work` for at most the time that anything may take.
    pub(crate) async fn in_time<T>(&self, doing: &'static str, work: impl Future<Output = Result<T>>) -> Result<T> {
        within(self.options().timeout, doing, work).await
    }
}

pub(crate) async fn within<T>(
    limit: Duration,
    doing: &'static str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Unavailable, "RabbitMQ does not answer")
            .with("doing", doing)
            .with("timeout", format!("{limit:?}")))
    })
}

/// What went wrong while `doing` something.
pub(crate) fn failed(doing: &'static str) -> impl Fn(lapin::Error) -> Error + Clone {
    move |why| {
        Error::new(ErrorKind::Unavailable, "RabbitMQ failed")
            .with("doing", doing)
            .because(why)
    }
}

/// Whether the broker said with this code that it will not do it: 404 not found, 405 locked, 406 declared otherwise.
pub(crate) fn is_reply(error: &lapin::Error, code: u16) -> bool {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(reply) => reply.get_id() == code,
        _ => false,
    }
}

/// Waits until the broker has come to this point of what was said on a channel that consumes `queue`.
pub(crate) async fn ask(channel: &Channel, queue: &str) -> std::result::Result<(), lapin::Error> {
    let passive = lapin::options::QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let asked = channel.queue_declare(queue.into(), passive, Default::default()).await;
    asked.map(drop)
}

/// A connection of the client's. Dropped, it is closed, whoever still holds channels of it, and nobody waits for that.
///
/// It keeps its channels: the client closes a channel whose last handle is dropped, and where the connection is being closed just
/// then, it takes that for an error, and says so at ERROR.
#[derive(Debug)]
pub(crate) struct Connection {
    client: Arc<lapin::Connection>,
    channels: Mutex<Vec<Channel>>,
}

impl Connection {
    pub(crate) async fn create_channel(&self) -> lapin::Result<Channel> {
        let channel = self.client.create_channel().await?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|channel| channel.status().connected());
        channels.push(channel.clone());
        Ok(channel)
    }
}

impl Deref for Connection {
    type Target = lapin::Connection;

    fn deref(&self) -> &lapin::Connection {
        &self.client
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current()
            && self.client.status().connected()
        {
            let client = self.client.clone();
            let channels = std::mem::take(self.channels.get_mut().unwrap_or_else(PoisonError::into_inner));
            runtime.spawn(async move {
                let _ = tokio::time::timeout(Duration::from_secs(5), client.close(200, "OK".into())).await;
                drop(channels);
            });
        }
    }
}
