//! Verbs of chunk servers: `make-cs`, `rm-cs`, `replace-cs`, `cs run`.

use crate::context::{Context, address, unexpected};
use crate::exit::usage;
use crate::verbs::removal;
use anyhow::{Context as _, Result, bail};
use cairn_cs::{CsRunConfig, MakeCs};
use cairn_types::{CsId, HostId};
use cairn_wire::mds::{CsInfo, CsState, MdsReply, MdsRequest};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Where a chunk server keeps its chunks and how it serves them: `make-cs`, `replace-cs`.
#[derive(Args, Debug)]
pub struct StoreArgs {
    /// Directory on the disk to use; created if missing.
    #[arg(short = 'r', value_name = "DIR")]
    repository: PathBuf,
    /// Address to listen on, `IP[:PORT]`; by default the address the metadata servers are reached from and any free
    /// port.
    #[arg(short = 'a', value_name = "ADDR")]
    addr: Option<String>,
    /// Space to use; by default nine tenths of what is free.
    #[arg(long, value_parser = crate::size)]
    size: Option<u64>,
    /// Raw block device to use instead of a file in the directory; everything on it is lost.
    #[arg(long, value_name = "DEV")]
    device: Option<PathBuf>,
    /// Writes the whole store now instead of ahead of use.
    #[arg(long)]
    fill: bool,
    /// Identity of the host, when several failure domains share this machine (tests).
    #[arg(long)]
    host_id: Option<HostId>,
    /// Every acknowledged write is durable at once, for clients that never flush.
    #[arg(long)]
    durable_always: bool,
}

/// Options of `make-cs`.
#[derive(Args, Debug)]
pub struct MakeCsArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Tier, 0 to 3.
    #[arg(short = 't', default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    tier: u8,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Options of `replace-cs`.
#[derive(Args, Debug)]
pub struct ReplaceCsArgs {
    /// Id of the server, as `list-services` shows it.
    id: u32,
    #[command(flatten)]
    store: StoreArgs,
}

/// Where a server stands: copies are kept apart on these levels where `failure-domain` says so.
#[derive(Args, Debug, Default)]
pub struct PlaceArgs {
    /// Rack the server stands in; told apart within its row.
    #[arg(long, value_name = "NAME", value_parser = place_name)]
    rack: Option<String>,
    /// Row of racks; told apart within its room.
    #[arg(long, value_name = "NAME", value_parser = place_name)]
    row: Option<String>,
    /// Room; told apart within its site.
    #[arg(long, value_name = "NAME", value_parser = place_name)]
    room: Option<String>,
    /// Site.
    #[arg(long, value_name = "NAME", value_parser = place_name)]
    site: Option<String>,
}

/// Longest name of a rack, row, room or site.
const PLACE_NAME_MAX: usize = 64;

fn place_name(text: &str) -> Result<String, String> {
    if text.len() > PLACE_NAME_MAX || text.chars().any(char::is_control) {
        return Err(format!("a name has at most {PLACE_NAME_MAX} bytes and no control characters"));
    }
    Ok(text.to_owned())
}

impl PlaceArgs {
    fn is_empty(&self) -> bool {
        [&self.rack, &self.row, &self.room, &self.site].iter().all(|name| name.is_none())
    }

    /// Replaces the names that were given.
    fn apply(&self, place: &mut Place) {
        let pairs = [
            (&self.rack, &mut place.rack),
            (&self.row, &mut place.row),
            (&self.room, &mut place.room),
            (&self.site, &mut place.site),
        ];
        for (given, kept) in pairs {
            if let Some(name) = given {
                kept.clone_from(name);
            }
        }
    }
}

/// Options of `rm-cs`.
#[derive(Args, Debug)]
pub struct RmCsArgs {
    /// Id of the server, as `list-services` shows it.
    id: u32,
    /// Waits until all its data is elsewhere.
    #[arg(long)]
    wait: bool,
    /// Stops an ongoing removal.
    #[arg(long, conflicts_with = "force")]
    cancel: bool,
    /// Drops an irrecoverably lost server at once.
    #[arg(short = 'f')]
    force: bool,
    /// With -f: even if chunks have no other current copy in reach; what needs them is lost.
    #[arg(long, requires = "force")]
    lose_data: bool,
    /// Changes nothing; shows what would be moved or lost, and what speaks against it.
    #[arg(long, conflicts_with_all = ["wait", "cancel"])]
    dry_run: bool,
}

/// Verbs of the daemon.
#[derive(Subcommand, Debug)]
pub enum CsVerb {
    /// Runs the chunk server of a repository in the foreground.
    Run {
        /// The repository directory.
        #[arg(short = 'r', value_name = "DIR")]
        repository: PathBuf,
    },
    /// Names the rack, row, room and site the chunk server of a repository stands in, from its next start on.
    ///
    /// Names that are not given stay as they are; an empty one takes the name away.
    SetLocation {
        /// The repository directory.
        #[arg(short = 'r', value_name = "DIR")]
        repository: PathBuf,
        /// The names.
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Lists what stopped chunk servers of this machine hold, in a file for `recover-metadata` on another one.
    Scan(super::recover::ScanArgs),
}

/// Free bytes of the file system that holds `path` or its nearest existing parent.
pub fn free_space(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    let output = cairn_env_real::free_bytes(existing).ok()?;
    Some(output)
}

/// Who a new store is for.
struct Role {
    replaces: Option<CsId>,
    tier: u8,
    place: Place,
}

/// Runs `make-cs`.
pub fn make(context: &Context, args: &MakeCsArgs) -> Result<()> {
    let mut role = Role { replaces: None, tier: args.tier, place: Place::default() };
    args.place.apply(&mut role.place);
    make_store(context, &args.store, role)?;
    let dir = args.store.repository.display();
    eprintln!("chunk server of cluster {} is made in {dir}", context.name()?);
    eprintln!("run it with: cairn cs run -r {dir}");
    Ok(())
}

fn make_store(context: &Context, args: &StoreArgs, role: Role) -> Result<()> {
    let name = context.name()?;
    let cluster = context.block_on(async |client| client.cluster().context("the cluster says who it is"))?;
    let addr = match &args.addr {
        Some(text) => address(text, 0)?,
        None => std::net::SocketAddr::new(route_to(context.mds()?[0])?, 0),
    };
    let host = args.host_id.map_or_else(|| context.host(), Ok)?;
    let free = free_space(&args.repository).unwrap_or(u64::MAX);
    if let Some(size) = args.size.filter(|size| args.device.is_none() && *size > free) {
        let (size, free) = (cairn_types::format_size(size), cairn_types::format_size(free));
        bail!("--size {size}: {} has only {free} free", args.repository.display());
    }
    let make = MakeCs {
        dir: args.repository.clone(),
        cluster,
        cluster_name: name.to_owned(),
        replaces: role.replaces,
        host,
        tier: role.tier,
        size: args.size,
        device: args.device.clone(),
        fill: args.fill,
    };
    make_with_options(&make, &CsOptions { listen: addr, durable_always: args.durable_always, place: role.place })
}

/// Runs `replace-cs`: a new, empty store for a server, under its id.
///
/// Each step may be the last one before a crash; the same command goes on from there.
pub fn replace(context: &Context, args: &ReplaceCsArgs) -> Result<()> {
    let (cs, dir) = (CsId(args.id), &args.store.repository);
    let old = server(context, cs)?.with_context(|| format!("{cs} does not exist"))?;
    let made = match cairn_cs::read_identity(dir) {
        Ok(found) if found.cs != Some(cs) || found.cluster_name != context.name()? => {
            bail!("{} is of another chunk server; name an empty directory on the new disk", dir.display())
        }
        Ok(found) => Some(found),
        Err(_) => None,
    };
    // An earlier run of this command may have come to its end without being able to say so.
    if let Some(made) = &made
        && old.state != CsState::Dropped
        && context.call(MdsRequest::CsReplace { cs, store: made.store }).is_ok()
    {
        return replaced(cs, dir);
    }
    // Asked first, so that what is refused leaves no directory behind.
    let works = matches!(old.state, CsState::Active | CsState::Draining);
    match old.state {
        CsState::Dropped => {}
        _ if works => {
            eprintln!("{cs} answers: its chunks are copied to other servers first");
            context.call(MdsRequest::CsRemove { cs, force: false, cancel: false })?;
        }
        _ => removal::check(context, cs)?,
    }
    let made = match made {
        Some(made) => made,
        None => {
            let [rack, row, room, site] =
                [&old.location.rack, &old.location.row, &old.location.room, &old.location.site].map(String::clone);
            let place = Place { rack, row, room, site };
            make_store(context, &args.store, Role { replaces: Some(cs), tier: old.tier, place })?;
            cairn_cs::read_identity(dir)?
        }
    };
    if works {
        wait_until_drained(context, cs)?;
    } else if old.state != CsState::Dropped {
        context.call(MdsRequest::CsRemove { cs, force: true, cancel: false })?;
    }
    context.block_on(async |client| {
        loop {
            match client.call(MdsRequest::CsReplace { cs, store: made.store }).await? {
                MdsReply::CsReplaced { left: 0 } => return Ok(()),
                MdsReply::CsReplaced { left } => eprintln!("{left} copies of the old store are being taken out"),
                other => return Err(unexpected(&other)),
            }
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    })?;
    replaced(cs, dir)
}

fn replaced(cs: CsId, dir: &Path) -> Result<()> {
    eprintln!("{cs} has a new store in {}; chunks that lack copies are copied to it", dir.display());
    eprintln!("run it with: cairn cs run -r {}", dir.display());
    Ok(())
}

fn server(context: &Context, cs: CsId) -> Result<Option<CsInfo>> {
    match context.call(MdsRequest::Topology)? {
        MdsReply::Topology { cs: servers, .. } => Ok(servers.into_iter().find(|info| info.cs == cs)),
        other => Err(unexpected(&other)),
    }
}

/// What `make-cs` was told that only the daemon needs: `options.json` in the repository.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CsOptions {
    /// Where it listens; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Every write is durable before its answer.
    pub durable_always: bool,
    /// Where it stands.
    #[serde(default)]
    pub place: Place,
}

/// Names of the places a server stands in; empty where the operator gave none.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Rack.
    pub rack: String,
    /// Row.
    pub row: String,
    /// Room.
    pub room: String,
    /// Site.
    pub site: String,
}

const OPTIONS_FILE: &str = "options.json";

impl CsOptions {
    /// Reads what was written for the server in `repository`.
    ///
    /// # Errors
    /// When the file is not there or damaged, with the way out.
    pub fn read(repository: &Path) -> Result<Self> {
        let path = repository.join(OPTIONS_FILE);
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is damaged; write it anew as {{\"listen\": \"IP:PORT\", \"durable_always\": false}}",
                path.display()
            )
        })
    }

    /// Replaces the file as a whole.
    fn write(&self, repository: &Path) -> Result<()> {
        let (path, fresh) = (repository.join(OPTIONS_FILE), repository.join("options.json.new"));
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(&fresh, text).with_context(|| format!("write {}", fresh.display()))?;
        std::fs::File::open(&fresh)?.sync_all()?;
        std::fs::rename(&fresh, &path).with_context(|| format!("replace {}", path.display()))
    }
}

/// Makes a repository and leaves the options of its daemon there.
pub fn make_with_options(make: &MakeCs, options: &CsOptions) -> Result<()> {
    cairn_cs::make_cs(make, |_| {})?;
    options.write(&make.dir)
}

/// The own address from which `to` is reached.
fn route_to(to: std::net::SocketAddr) -> Result<std::net::IpAddr> {
    let any: std::net::SocketAddr = if to.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.connect(to).with_context(|| format!("find the route to {to}"))?;
    Ok(socket.local_addr()?.ip())
}

/// Runs `rm-cs`.
pub fn remove(context: &Context, args: &RmCsArgs) -> Result<()> {
    let cs = CsId(args.id);
    if args.dry_run {
        return removal::show(context, cs, args.force, args.lose_data);
    }
    if args.force && !args.lose_data {
        removal::check(context, cs)?;
    }
    context.call(match args.lose_data {
        true => MdsRequest::CsAbandon { cs },
        false => MdsRequest::CsRemove { cs, force: args.force, cancel: args.cancel },
    })?;
    if args.wait { wait_until_drained(context, cs) } else { Ok(()) }
}

fn wait_until_drained(context: &Context, cs: CsId) -> Result<()> {
    context.block_on(async |client| {
        let mut told = None;
        loop {
            let MdsReply::Topology { cs: servers, .. } = client.call(MdsRequest::Topology).await? else {
                bail!("unexpected answer to Topology");
            };
            let left = servers.iter().find(|info: &&CsInfo| info.cs == cs);
            match left.map(|info| (info.state, info.stats.chunks)) {
                None | Some((CsState::Dropped, _)) => return Ok(()),
                Some((CsState::Draining, chunks)) => {
                    if told.replace(chunks) != Some(chunks) {
                        eprintln!("{chunks} chunks left");
                    }
                }
                Some((state, _)) => bail!("{cs} is {}: the removal was cancelled", super::cluster::state_word(state)),
            }
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    })
}

/// Runs a verb of the daemon.
pub fn run(context: &Context, verb: &CsVerb) -> Result<()> {
    match verb {
        CsVerb::Run { repository } => serve(repository),
        CsVerb::Scan(args) => super::recover::scan(context, args),
        CsVerb::SetLocation { repository, place } => set_location(repository, place),
    }
}

fn set_location(repository: &Path, place: &PlaceArgs) -> Result<()> {
    if place.is_empty() {
        return Err(usage("give at least one of --rack, --row, --room and --site"));
    }
    cairn_cs::read_identity(repository)?;
    let mut options = CsOptions::read(repository)?;
    place.apply(&mut options.place);
    options.write(repository)?;
    eprintln!("it counts from the next start of this chunk server on; copies that exist are not moved for it");
    Ok(())
}

fn serve(repository: &Path) -> Result<()> {
    let name = cairn_cs::read_identity(repository)?.cluster_name;
    let files = cairn_client::cluster::ClusterFiles::new(&name)?;
    let options = CsOptions::read(repository)?;
    // What the cluster shows as its place must mean the same everywhere.
    let repository = std::fs::canonicalize(repository).with_context(|| format!("resolve {}", repository.display()))?;
    let mut config = CsRunConfig::new(repository, name, files.key()?, files.all_servers()?);
    let Place { rack, row, room, site } = options.place;
    config.place = [rack, row, room, site];
    config.listen = Some(options.listen);
    config.durable_always = options.durable_always;
    config.host_name = cairn_client::cluster::host_name();
    cairn_cs::run(&config)?;
    Ok(())
}
