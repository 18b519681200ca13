//! Two instances of a server. Unless each instance counts separately, the two instances share one Redis, which they
//! reach through proxies that can delay its responses.

use std::{cell::Cell, net::SocketAddr, time::Duration};

use anyhow::{Result, bail};
use quota_testkit::{
    proxy::{Fault, FaultProxy, Upstream},
    redis::RedisServer,
};
use tokio::runtime::Runtime;

use super::{
    LIMIT, MOST, Options,
    peer::{AMPLE, LIMITED, Peer, Program, get},
    windows::Rule,
};
use crate::{
    process::Cores,
    replicas::{
        fleet::{Database, Fleet, Setup},
        tenant::{self, Tenant},
    },
};

const INSTANCES: usize = 2;
/// The default of `QUOTA_LEASE_TTL`, which the bound of a plan with leases includes.
pub(super) const LEASE_TTL: Duration = Duration::from_millis(100);
const ECHO: &str = "/v1/echo";

/// A kind of server, and its settings.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Quota { burst: u32, strict: bool },
    Peer { program: Program, is_shared: bool },
}

pub(crate) const KINDS: [(&str, Kind); 10] = [
    (
        "Quota",
        Kind::Quota {
            burst: LIMIT,
            strict: false,
        },
    ),
    (
        "Quota, burst of 60",
        Kind::Quota {
            burst: LIMIT / 10,
            strict: false,
        },
    ),
    (
        "Quota, strict plan",
        Kind::Quota {
            burst: LIMIT,
            strict: true,
        },
    ),
    (
        "Fastify, rate-limiter-flexible, Redis",
        Kind::Peer {
            program: Program::Fastify,
            is_shared: true,
        },
    ),
    (
        "FastAPI, slowapi, Redis, fixed window",
        Kind::Peer {
            program: Program::FastApi("fixed-window"),
            is_shared: true,
        },
    ),
    (
        "FastAPI, slowapi, Redis, moving window",
        Kind::Peer {
            program: Program::FastApi("moving-window"),
            is_shared: true,
        },
    ),
    (
        "limitador, Redis",
        Kind::Peer {
            program: Program::Limitador("redis"),
            is_shared: true,
        },
    ),
    (
        "limitador, Redis cached",
        Kind::Peer {
            program: Program::Limitador("redis_cached"),
            is_shared: true,
        },
    ),
    (
        "nginx `limit_req`, each instance alone",
        Kind::Peer {
            program: Program::Nginx,
            is_shared: false,
        },
    ),
    (
        "HAProxy stick table, each instance alone",
        Kind::Peer {
            program: Program::HaProxy,
            is_shared: false,
        },
    ),
];

impl Kind {
    /// Returns the rule by which a single instance counts.
    pub(crate) fn rule(self) -> Rule {
        match self {
            Self::Quota { burst, strict } => Rule::Bucket {
                burst,
                slack: if strict { Duration::ZERO } else { LEASE_TTL },
            },
            // nginx allows one request in addition to the burst.
            Self::Peer {
                program: Program::Nginx,
                ..
            } => Rule::Bucket {
                burst: LIMIT + 1,
                slack: Duration::ZERO,
            },
            Self::Peer { .. } => Rule::Window,
        }
    }
}

pub(crate) struct Pair {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    // Fields are dropped in this order.
    instances: Instances,
    pub(crate) redis: Option<RedisServer>,
    proxies: Vec<FaultProxy>,
    keys: Cell<u32>,
}

enum Instances {
    Quota(Box<Quota>),
    Peers(Vec<Peer>),
}

pub(crate) struct Quota {
    fleet: Fleet,
    pub(crate) tenant: Tenant,
    database: Database,
}

impl Pair {
    pub(crate) fn start(
        options: &Options,
        runtime: &Runtime,
        cores: Option<Cores>,
        name: &'static str,
        kind: Kind,
    ) -> Result<Self> {
        let is_shared = !matches!(
            kind,
            Kind::Peer {
                is_shared: false,
                ..
            }
        );
        let mut redis = None;
        let mut proxies = Vec::new();
        if is_shared {
            let server = runtime.block_on(RedisServer::start());
            for _ in 0..INSTANCES {
                let upstream = Upstream::Tcp(server.addr());
                proxies.push(runtime.block_on(FaultProxy::start_apart(upstream)));
            }
            redis = Some(server);
        }
        let url = |proxy: &FaultProxy| format!("redis://{}/0", proxy.addr());
        let urls: Vec<String> = proxies.iter().map(url).collect();
        let instances = Cores::starting(cores, || {
            Ok(match kind {
                Kind::Quota { .. } => {
                    let quota = runtime.block_on(Quota::start(options, urls))?;
                    Instances::Quota(Box::new(quota))
                }
                Kind::Peer { program, .. } => {
                    let start = |n: usize| {
                        let url = urls.get(n).map(String::as_str);
                        Peer::start(program, options, LIMIT, url)
                    };
                    Instances::Peers((0..INSTANCES).map(start).collect::<Result<_>>()?)
                }
            })
        })?;
        Ok(Self {
            name,
            kind,
            instances,
            redis,
            proxies,
            keys: Cell::new(0),
        })
    }

    pub(crate) fn addrs(&self) -> Vec<SocketAddr> {
        match &self.instances {
            Instances::Quota(quota) => quota.fleet.addrs(),
            Instances::Peers(peers) => peers.iter().map(|it| it.addr).collect(),
        }
    }

    pub(crate) fn quota(&self) -> Option<&Quota> {
        match &self.instances {
            Instances::Quota(quota) => Some(quota),
            Instances::Peers(_) => None,
        }
    }

    /// Returns a request with a new key that has the limit to test.
    pub(crate) async fn limited(&self) -> Result<Vec<u8>> {
        let (burst, strict) = match self.kind {
            Kind::Quota { burst, strict } => (burst, strict),
            Kind::Peer { program, .. } => {
                return Ok(program.request(LIMITED, &self.unique("key")));
            }
        };
        let plan = tenant::Plan {
            strict,
            ..tenant::Plan::new(self.unique("limited"), LIMIT, burst)
        };
        self.with_plan(&plan).await
    }

    /// Returns a request with a new key whose limit is never reached.
    pub(crate) async fn ample(&self) -> Result<Vec<u8>> {
        let strict = match self.kind {
            Kind::Quota { strict, .. } => strict,
            Kind::Peer { program, .. } => {
                return Ok(program.request(AMPLE, &self.unique("key")));
            }
        };
        let plan = tenant::Plan {
            strict,
            ..tenant::Plan::new(self.unique("ample"), MOST, MOST)
        };
        self.with_plan(&plan).await
    }

    async fn with_plan(&self, plan: &tenant::Plan) -> Result<Vec<u8>> {
        let Some(quota) = self.quota() else {
            bail!("a peer has no plans");
        };
        let key = quota.tenant.key_on(self.addrs()[0], plan).await?;
        Ok(get(ECHO, key.text.to_str()?))
    }

    fn unique(&self, what: &str) -> String {
        self.keys.set(self.keys.get() + 1);
        format!("{what}-{}", self.keys.get())
    }

    pub(crate) fn set(&self, fault: Fault) {
        for proxy in &self.proxies {
            proxy.set(fault);
        }
    }

    pub(crate) async fn end(self) -> Result<()> {
        if let Instances::Quota(mut quota) = self.instances {
            quota.fleet.stop().await?;
            quota.database.remove().await?;
        }
        Ok(())
    }
}

impl Quota {
    async fn start(options: &Options, redis_urls: Vec<String>) -> Result<Self> {
        let database = Database::create(&options.postgres).await?;
        let setup = Setup {
            binary: options.quota.clone(),
            database_url: database.url.clone(),
            redis_urls,
            settings: Vec::new(),
        };
        let fleet = Fleet::start(setup, INSTANCES).await?;
        let tenant = Tenant::register(fleet.addrs()[0]).await?;
        Ok(Self {
            fleet,
            tenant,
            database,
        })
    }
}
