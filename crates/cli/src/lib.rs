//! The command line: arguments, one file per verb, screens.
//!
//! Data goes to stdout, everything else to stderr. `-o json` works everywhere. Exit codes: 0 done, 1 failed (the reason
//! is on stderr), 2 the arguments make no sense, 3 no metadata server answers, 4 authentication failed. Start at
//! [`main`].

pub mod bench;
pub mod context;
mod exit;
mod password;
pub mod quickstart;
pub mod verbs;

use clap::{Parser, Subcommand, ValueEnum};

/// Parses a size argument such as `10G`.
fn size(text: &str) -> Result<u64, String> {
    cairn_types::parse_size(text).map_err(|error| error.to_string())
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Cairn: the disks of ordinary servers as one pool of volumes, files and objects.
#[derive(Parser, Debug)]
#[command(name = "cairn", version, about, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Cluster to work on; CAIRN_CLUSTER when absent.
    #[arg(short = 'c', long, global = true, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Metadata servers to ask, instead of those in bs.list.
    #[arg(long, global = true, value_name = "ADDR", value_delimiter = ',')]
    pub mds_addr: Vec<String>,
    /// Output format.
    #[arg(short = 'o', long, global = true, value_enum, default_value = "text")]
    pub output: Output,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Verbs. Those of the ledger keep their spelling; noun-verb forms stand beside them.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Starts a whole cluster on this machine: 3 metadata servers, 4 chunk servers, a mount and an NBD export.
    Quickstart(quickstart::QuickstartArgs),
    /// Creates a cluster with its first metadata server (-I), or adds one to a cluster.
    MakeMds(verbs::mds::MakeMdsArgs),
    /// Removes a metadata server.
    RmMds(verbs::mds::RmMdsArgs),
    /// Runs a metadata server.
    #[command(subcommand)]
    Mds(verbs::mds::MdsVerb),
    /// Stores the cluster key on this node after checking the password with the cluster.
    AuthNode(verbs::auth::AuthNodeArgs),
    /// Makes a directory a chunk server of the cluster.
    MakeCs(verbs::cs::MakeCsArgs),
    /// Removes a chunk server: drains it first.
    RmCs(verbs::cs::RmCsArgs),
    /// Gives a chunk server a new, empty disk; it keeps its id and its place.
    ReplaceCs(verbs::cs::ReplaceCsArgs),
    /// Runs a chunk server, or says where it stands.
    #[command(subcommand)]
    Cs(verbs::cs::CsVerb),
    /// Mounts the cluster's namespace.
    Mount(verbs::mount::MountArgs),
    /// Lists the servers of the cluster, or with -M / -C the repositories on this machine.
    ListServices(verbs::cluster::ListServicesArgs),
    /// Shows health, space and servers.
    Stat,
    /// Shows the release levels of the cluster and of everybody in it; --finalize ends an upgrade.
    Upgrade(verbs::upgrade::UpgradeArgs),
    /// Shows the attributes of a file or directory on a mount.
    GetAttr(verbs::attr::GetAttrArgs),
    /// Sets attributes, as `replicas=3:2` or `failure-domain=host`.
    SetAttr(verbs::attr::SetAttrArgs),
    /// Shows the configuration parameters.
    GetConfig,
    /// Sets configuration parameters, as `mds.wd.offline_tout=300`.
    SetConfig(verbs::cluster::SetConfigArgs),
    /// Shows the event log.
    GetEvent(verbs::cluster::GetEventArgs),
    /// Writes the metadata of the running cluster to a file.
    BackupMetadata(verbs::backup::BackupArgs),
    /// Makes the metadata anew from the chunk servers after every metadata server was lost.
    RecoverMetadata(verbs::recover::RecoverArgs),
    /// Ends a client's session by force and fences it.
    Revoke(verbs::cluster::RevokeArgs),
    /// Block volumes.
    #[command(subcommand)]
    Volume(verbs::volume::VolumeVerb),
    /// Serves volumes over NBD.
    #[command(subcommand)]
    Nbd(verbs::nbd::NbdVerb),
    /// Measures a volume beside the raw disk and the loopback.
    Bench(bench::BenchArgs),
    /// Runs the simulator.
    Sim(verbs::sim::SimArgs),
    /// Reads and explains what is on a disk, without a daemon.
    #[command(subcommand)]
    Doctor(verbs::doctor::DoctorVerb),
}

/// The whole program; gives the exit code.
pub fn main() -> i32 {
    exit::leave_quietly_when_nobody_reads();
    // `mount -t fuse.cairn` runs us as a mount helper with its own way of giving arguments.
    if let Some(code) = verbs::mount::run_as_mount_helper() {
        return code;
    }
    let cli = match Cli::try_parse_from(verbs::mount::with_mount_options(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { exit::USAGE } else { exit::DONE };
        }
    };
    match dispatch(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cairn: {}", exit::in_words(&error));
            exit::code_of(&error)
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<i32> {
    let context = context::Context::new(cli);
    match &cli.verb {
        Verb::Quickstart(args) => return quickstart::run(args),
        Verb::MakeMds(args) => verbs::mds::make(&context, args)?,
        Verb::RmMds(args) => verbs::mds::remove(&context, args)?,
        Verb::Mds(verb) => verbs::mds::run(verb)?,
        Verb::AuthNode(args) => verbs::auth::run(&context, args)?,
        Verb::MakeCs(args) => verbs::cs::make(&context, args)?,
        Verb::RmCs(args) => verbs::cs::remove(&context, args)?,
        Verb::ReplaceCs(args) => verbs::cs::replace(&context, args)?,
        Verb::Cs(verb) => verbs::cs::run(&context, verb)?,
        Verb::Mount(args) => verbs::mount::run(&context, args)?,
        Verb::ListServices(args) => verbs::cluster::list_services(&context, args)?,
        Verb::Stat => verbs::cluster::stat(&context)?,
        Verb::Upgrade(args) => verbs::upgrade::run(&context, args)?,
        Verb::GetAttr(args) => verbs::attr::get(&context, args)?,
        Verb::SetAttr(args) => verbs::attr::set(&context, args)?,
        Verb::GetConfig => verbs::cluster::get_config(&context)?,
        Verb::SetConfig(args) => verbs::cluster::set_config(&context, args)?,
        Verb::GetEvent(args) => verbs::cluster::get_event(&context, args)?,
        Verb::BackupMetadata(args) => verbs::backup::run(&context, args)?,
        Verb::RecoverMetadata(args) => return verbs::recover::run(&context, args),
        Verb::Revoke(args) => verbs::cluster::revoke(&context, args)?,
        Verb::Volume(verb) => verbs::volume::run(&context, verb)?,
        Verb::Nbd(verb) => verbs::nbd::run(&context, verb)?,
        Verb::Bench(args) => bench::run(&context, args)?,
        Verb::Sim(args) => return verbs::sim::run(args),
        Verb::Doctor(verb) => return verbs::doctor::run(&context, verb),
    }
    Ok(exit::DONE)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        super::Cli::command().debug_assert();
    }
}
