//! Connecting.

use crate::config::{Login, RabbitMqOptions, without_password};
use lapin::{
    Channel, ConnectionProperties,
    tcp::{OwnedIdentity, OwnedTLSConfig},
    uri::{AMQPScheme, AMQPUri, AMQPUserInfo},
};
use postrider_core::{Error, ErrorKind, Result, subscriber::QueueOptions};
use std::{
    ops::Deref,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Where the broker is, and how to talk to it.
#[derive(Debug, Clone)]
pub(crate) struct Broker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: RabbitMqOptions,
    queue: QueueOptions,
    nodes: Vec<Node>,
    /// The one that answered last: the next connection tries it first.
    last: AtomicUsize,
}

/// A node of the cluster. Its address holds a password and is not shown.
struct Node {
    uri: AMQPUri,
    shown: String,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Node {
    fn at(url: &str, options: &RabbitMqOptions) -> Result<Self> {
        let shown = without_password(url);
        let mut uri: AMQPUri = url.parse().map_err(|why: String| {
            let text = "the address of RabbitMQ cannot be read: amqp://user:password@host:5672/vhost";
            Error::new(ErrorKind::Config, text)
                .with("url", &shown)
                .because(why.replace(url, "…"))
        })?;
        // What the address says counts, where nothing else is said.
        if uri.query.heartbeat.is_none() || options.heartbeat != RabbitMqOptions::default().heartbeat {
            uri.query.heartbeat = Some(u16::try_from(options.heartbeat.as_secs()).unwrap_or(u16::MAX));
        }
        uri.query.connection_timeout = Some(u64::try_from(options.timeout.as_millis()).unwrap_or(u64::MAX));
        let certificates = options.ca_file.as_ref().map(|file| ("ca_file", file));
        let shows = options
            .client_certificate
            .as_ref()
            .map(|(file, _)| ("client_certificate", file));
        if let Some((option, file)) = certificates.or(shows)
            && uri.scheme != AMQPScheme::AMQPS
        {
            let text = "certificates are given, but the address is not one of TLS: amqps://";
            return Err(Error::new(ErrorKind::Config, text)
                .with("url", shown)
                .with(option, file.display()));
        }
        Ok(Self { uri, shown })
    }
}

impl Broker {
    pub(crate) fn new(options: RabbitMqOptions) -> Result<Self> {
        Self::with_queue(options, QueueOptions::default())
    }

    fn with_queue(options: RabbitMqOptions, queue: QueueOptions) -> Result<Self> {
        let urls = std::iter::once(&options.url).chain(&options.further_urls);
        let nodes = urls.map(|url| Node::at(url, &options)).collect::<Result<_>>()?;
        // What cannot be read is told at once.
        tls(&options)?;
        Ok(Self(Arc::new(Inner {
            options,
            queue,
            nodes,
            last: AtomicUsize::new(0),
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

    /// A connection for `what`, which its name says: to the node that answered last, or the next that does.
    pub(crate) async fn connect(&self, what: &str) -> Result<Connection> {
        let nodes = &self.0.nodes;
        let first = self.0.last.load(Ordering::Relaxed);
        let mut failed = None;
        for n in (first..first + nodes.len()).map(|n| n % nodes.len()) {
            match self.connect_to(&nodes[n], what).await {
                Ok(connection) => {
                    self.0.last.store(n, Ordering::Relaxed);
                    return Ok(connection);
                }
                // Of the others, what they are: the first one says why.
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let failed = failed.unwrap_or_else(|| Error::new(ErrorKind::Config, "RabbitMQ has no address"));
        Err(match nodes.len() {
            1 => failed,
            count => failed.with("tried", format!("{count} nodes")),
        })
    }

    async fn connect_to(&self, node: &Node, what: &str) -> Result<Connection> {
        let failed = |why: lapin::Error| {
            let text = match why.kind() {
                lapin::ErrorKind::ProtocolError(_) => {
                    "RabbitMQ refuses the connection: user, password, or virtual host"
                }
                _ => "RabbitMQ cannot be reached",
            };
            Error::new(ErrorKind::Unavailable, text).because(why)
        };
        let name = format!("{} {what}", self.options().connection_name);
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let runtime = lapin::runtime::default_runtime()
            .map_err(|why| Error::new(ErrorKind::Unexpected, "RabbitMQ's client needs a tokio runtime").because(why))?;
        let mut uri = node.uri.clone();
        let options = self.options().clone();
        let asked = tokio::task::spawn_blocking(move || {
            let login = options.login().map(|source| (source.0)()).transpose()?;
            Ok((login, tls(&options)?))
        });
        let connecting = async {
            let asked = asked
                .await
                .map_err(|why| Error::new(ErrorKind::Unexpected, "asking for the login has failed").because(why))?;
            let (login, tls) = asked?;
            if let Some(Login { user, password, .. }) = login {
                uri.authority.userinfo = AMQPUserInfo {
                    username: user,
                    password,
                };
            }
            lapin::Connection::connect_uri_with_config(uri, properties, tls, runtime)
                .await
                .map_err(failed)
        };
        let limit = self.options().timeout / u32::try_from(self.0.nodes.len()).unwrap_or(u32::MAX);
        let client = within(limit, "connecting", connecting).await;
        Ok(Connection {
            client: Arc::new(client.map_err(|error| error.with("url", &node.shown))?),
            channels: Mutex::default(),
        })
    }

    /// Runs `work` for at most the time that anything may take.
    pub(crate) async fn in_time<T>(&self, doing: &'static str, work: impl Future<Output = Result<T>>) -> Result<T> {
        within(self.options().timeout, doing, work).await
    }
}

/// What is shown to brokers, and trusted of them. Read for each connection: certificates expire.
fn tls(options: &RabbitMqOptions) -> Result<OwnedTLSConfig> {
    let read = |option: &'static str, file: &PathBuf| {
        std::fs::read(file).map_err(|why| {
            Error::new(ErrorKind::Config, "a certificate or a key cannot be read")
                .with(option, file.display())
                .because(why)
        })
    };
    let identity = match &options.client_certificate {
        None => None,
        Some((certificate, key)) => Some(OwnedIdentity::PKCS8 {
            pem: read("client_certificate", certificate)?,
            key: read("client_key", key)?,
        }),
    };
    let chain = options.ca_file.as_ref().map(|file| read("ca_file", file)).transpose()?;
    Ok(OwnedTLSConfig {
        identity,
        cert_chain: chain.map(|pem| String::from_utf8_lossy(&pem).into_owned()),
    })
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

/// Waits until the broker has come to this point of what was said on a channel that consumes `queue`, and gives how many messages
/// lie ready there.
pub(crate) async fn ask(channel: &Channel, queue: &str) -> std::result::Result<u32, lapin::Error> {
    let passive = lapin::options::QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let asked = channel.queue_declare(queue.into(), passive, Default::default()).await;
    asked.map(|queue| queue.message_count())
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
