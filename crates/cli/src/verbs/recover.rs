//! `recover-metadata` and `cs scan`: the metadata of a cluster made anew from its chunk servers after every metadata
//! server was lost. What comes back and why: `docs/design/metadata.md`, "Disaster"; for operators:
//! `docs/guide/disaster.md`.

mod scan;

use crate::context::{Context, MDS_PORT, address};
use crate::exit::{self, usage};
use crate::password;
use crate::verbs::mds::{FreshDir, check_address, fresh_instance};
use anyhow::{Context as _, Result, bail};
use cairn_mds::repository::Identity;
use cairn_mds::{
    backup_file,
    disaster::{self, TERM_MARGIN},
};
use cairn_meta::recover::{Listing, Options, Report, recover};
use cairn_meta::{BaseKv, MemKv, Pairs};
use cairn_types::{ClusterId, Redundancy, VolumeId};
use cairn_wire::auth::ClusterKey;
use cairn_wire::mds::MdsRequest;
use clap::Args;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a metadata server that may still run gets to accept a connection.
const PROBE_LIMIT: Duration = Duration::from_secs(2);

/// Options of `recover-metadata`.
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// Directory for log and state of the new first metadata server; must be empty or missing.
    #[arg(short = 'r', value_name = "DIR")]
    repository: PathBuf,
    /// Address it will listen on, `IP[:PORT]`; one that stands in the bs.list of all nodes saves editing those.
    #[arg(short = 'a', value_name = "ADDR")]
    addr: String,
    /// Takes names, attributes and sizes from a file of `backup-metadata`.
    #[arg(long, value_name = "FILE", conflicts_with = "from_mds")]
    from_backup: Option<PathBuf>,
    /// Takes them from the directory of a metadata server that survived alone; it must be stopped, and never run again.
    #[arg(long, value_name = "DIR")]
    from_mds: Option<PathBuf>,
    /// Shows what would come back and changes nothing.
    #[arg(long)]
    dry_run: bool,
    /// Goes on although chunk servers are missing or chunks have no complete copy.
    #[arg(long)]
    incomplete: bool,
    /// Copies and minimum of volumes of which nothing else is known; by default as many copies as were found.
    #[arg(long, value_name = "N[:M]")]
    replicas: Option<Redundancy>,
    /// Volumes of unknown kind that are block volumes, by number, or `all`; the others become files under /recovered.
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    block_volumes: Vec<String>,
    /// Asks for the cluster password; needed when this node lacks the key.
    #[arg(short = 'p')]
    password: bool,
    /// Reads the password from a file instead of asking.
    #[arg(long)]
    password_file: Option<PathBuf>,
    /// Directories of the chunk servers, all of them and all stopped, or files that `cs scan` made on other machines.
    #[arg(required = true, value_name = "CSDIR|FILE")]
    sources: Vec<PathBuf>,
}

/// Options of `cs scan`.
#[derive(Args, Debug)]
pub struct ScanArgs {
    /// File to write.
    #[arg(short = 'w', value_name = "FILE")]
    file: PathBuf,
    /// Directories of stopped chunk servers.
    #[arg(required = true, value_name = "CSDIR")]
    dirs: Vec<PathBuf>,
}

/// Runs `cs scan`.
pub fn scan(context: &Context, args: &ScanArgs) -> Result<()> {
    let name = context.name()?;
    let listings: Vec<Listing> = args.dirs.iter().map(|dir| scan::scan(dir, name)).collect::<Result<_>>()?;
    std::fs::write(&args.file, scan::to_file(name, &listings))
        .with_context(|| format!("write {}", args.file.display()))?;
    let copies: usize = listings.iter().map(|listing| listing.copies.len()).sum();
    eprintln!("{} chunk servers with {copies} copies are listed in {}", listings.len(), args.file.display());
    Ok(())
}

/// Runs `recover-metadata`; the exit code is 1 when it stops because something is missing.
pub fn run(context: &Context, args: &RecoverArgs) -> Result<i32> {
    let name = context.name()?;
    let addr = address(&args.addr, MDS_PORT)?;
    if addr.ip().is_unspecified() {
        return Err(usage(format!("-a {addr}: give the address other nodes reach this server at, not a wildcard")));
    }
    let ask = args.password || args.password_file.is_some();
    let key = match ask {
        true => ClusterKey::derive(name, &password::ask(args.password_file.as_deref(), false)?)?,
        false => context.key()?,
    };
    refuse_if_alive(context)?;
    check_address(addr)?;
    let mut fresh = None;
    if !args.dry_run {
        fresh = Some(FreshDir::prepare(&args.repository)?);
    }
    let listings = read_sources(&args.sources, name)?;
    let (term, backup) = read_backup(args, name)?;
    let options = Options {
        name: name.to_owned(),
        addr,
        repository: args.repository.display().to_string(),
        redundancy: args.replicas,
        block_volumes: block_volumes(&args.block_volumes)?,
        all_block_volumes: args.block_volumes.iter().any(|word| word == "all"),
        wall_ns: cairn_env_real::clock::wall_ns(),
    };
    let (state, report) = recover(&options, &listings, backup)?;
    show(context, &report)?;
    let Some(mut fresh) = fresh else {
        eprintln!("nothing was changed (--dry-run)");
        return Ok(exit::DONE);
    };
    if !report.is_whole() && !args.incomplete {
        eprintln!(
            "cairn: nothing was changed, because something is missing: give all chunk servers, or --incomplete to go on \
             without"
        );
        return Ok(exit::FAILED);
    }
    let dir = std::fs::canonicalize(&args.repository).context("resolve the repository directory")?;
    make(&dir, addr, name, &report, term, &state)?;
    fresh.keep();
    keep_on_this_node(context, &key, addr)?;
    eprintln!("metadata server {} of cluster {name} is made in {}", report.mds.0, dir.display());
    eprintln!("run it with `cairn mds run -r {}`, then the chunk servers; add further metadata", dir.display());
    eprintln!("servers with make-mds; look at the data; then `cairn set-config mds.recovery.hold=0`.");
    eprintln!("No metadata server of before may ever run again.");
    Ok(exit::DONE)
}

/// Two groups of one cluster would be the end of its data: there must be nobody left who could serve.
fn refuse_if_alive(context: &Context) -> Result<()> {
    let Ok(known) = context.mds() else {
        eprintln!("warning: this node knows no metadata server of the cluster; make sure that none runs");
        return Ok(());
    };
    let Some(alive) = known.iter().find(|addr| TcpStream::connect_timeout(addr, PROBE_LIMIT).is_ok()) else {
        return Ok(());
    };
    match context.call(MdsRequest::Topology) {
        Ok(_) => bail!("the metadata servers answer: there is nothing to recover"),
        Err(error) if exit::code_of(&error) == exit::REFUSED => {
            Err(error.context(format!("ask {alive} whether it serves")))
        }
        Err(_) => bail!(
            "something listens at {alive}, where a metadata server was. If it is one without a majority, stop it for good \
             and give its directory with --from-mds"
        ),
    }
}

fn read_sources(sources: &[PathBuf], name: &str) -> Result<Vec<Listing>> {
    let mut listings = Vec::new();
    for source in sources {
        eprintln!("reading {}", source.display());
        listings.extend(scan::read_source(source, name)?);
    }
    Ok(listings)
}

/// Term to go on from, and the state of before.
fn read_backup(args: &RecoverArgs, name: &str) -> Result<(u64, Option<MemKv>)> {
    let (term, of, pairs) = if let Some(path) = &args.from_backup {
        let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
        let (header, pairs) = backup_file::read(std::io::BufReader::new(file))
            .with_context(|| format!("read the backup {}", path.display()))?;
        (header.term, header.name, pairs)
    } else if let Some(dir) = &args.from_mds {
        let absolute = std::path::absolute(&args.repository)?;
        let scratch = absolute.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
        let (identity, term, pairs) =
            disaster::read(dir, scratch).with_context(|| format!("read the metadata server in {}", dir.display()))?;
        (term, identity.cluster_name, pairs)
    } else {
        return Ok((TERM_MARGIN, None));
    };
    if of != name {
        bail!("the backup is of cluster {of}, not {name}");
    }
    Ok((term + TERM_MARGIN, Some(pairs.into_iter().collect())))
}

fn block_volumes(words: &[String]) -> Result<std::collections::BTreeSet<VolumeId>> {
    let number = |word: &String| {
        let digits = word.strip_prefix("vol#").unwrap_or(word);
        digits.parse().map(VolumeId).map_err(|_| usage(format!("`{word}` is not the number of a volume")))
    };
    words.iter().filter(|word| *word != "all").map(number).collect()
}

fn show(context: &Context, report: &Report) -> Result<()> {
    if context.json() {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}

fn make(dir: &Path, addr: SocketAddr, name: &str, report: &Report, term: u64, state: &MemKv) -> Result<()> {
    let identity = Identity {
        version: 1,
        cluster: ClusterId(report.cluster.0).to_string(),
        cluster_name: name.to_owned(),
        id: report.mds.0,
        instance: fresh_instance(),
        bootstrap: true,
        addr,
        servers: vec![(report.mds.0, addr)],
    };
    let pairs: Pairs = state.scan(&[0], &[u8::MAX], usize::MAX);
    disaster::create(dir, &identity, report.index, term, &pairs).context("write the new state")
}

/// The new server is the only one this node knows; the list of before stays beside it.
fn keep_on_this_node(context: &Context, key: &ClusterKey, addr: SocketAddr) -> Result<()> {
    let files = context.files()?;
    files.write_key(key)?;
    let path = files.bs_list_path();
    if path.exists() {
        let before = path.with_extension("list.before-recovery");
        std::fs::copy(&path, &before).with_context(|| format!("copy {} to {}", path.display(), before.display()))?;
    }
    files.forget_kept_servers()?;
    Ok(files.write_servers(&[addr])?)
}
