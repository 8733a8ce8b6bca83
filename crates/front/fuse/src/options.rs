//! What may be said when mounting: `-o` lists, fstab lines, the arguments mount(8) gives its helpers.

use std::path::PathBuf;

/// How a file system is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Where.
    pub mountpoint: PathBuf,
    /// No changes.
    pub read_only: bool,
    /// Writes fail with `ENOSPC` when the cluster is full instead of waiting.
    pub fail_on_no_space: bool,
    /// Where lines for the operator go; standard error when none.
    pub log_file: Option<PathBuf>,
    /// Users other than the one who mounts may look inside; permissions are checked by the kernel either way.
    pub allow_other: bool,
    /// Threads that read requests from the kernel.
    pub threads: usize,
    /// What `mount` and `df` show as the source: `cairn://NAME`.
    pub fsname: String,
    /// The kernel keeps written data and owns sizes and times until it writes back. Fast for small writes; other
    /// mounts see changes late, so this is for file systems used by one mount at a time.
    pub writeback: bool,
    /// How long an open waits for another client to give its lease back before it fails with `EBUSY`.
    pub lease_wait_seconds: u64,
    /// Device nodes work.
    pub dev: bool,
    /// Set-user-id bits work.
    pub suid: bool,
    /// Programs run.
    pub exec: bool,
    /// Every write is synchronous.
    pub sync: bool,
}

/// The arguments of a mount helper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountArgs {
    /// Name of the cluster.
    pub cluster: String,
    /// How to mount it.
    pub options: MountOptions,
    /// Stay in the foreground (`-f` of FUSE programs, `-o foreground`).
    pub foreground: bool,
}

/// Arguments that make no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountArgsError {
    /// No source.
    #[error("nothing to mount: expected cairn://NAME DIRECTORY")]
    SourceMissing,
    /// No mount point.
    #[error("no directory to mount {source_name} on")]
    DirectoryMissing {
        /// What was to be mounted.
        source_name: String,
    },
    /// A source of the wrong form.
    #[error("`{source_name}` is not cairn://NAME")]
    Source {
        /// What was given.
        source_name: String,
    },
    /// A word too many.
    #[error("unexpected argument `{argument}`")]
    Argument {
        /// The word.
        argument: String,
    },
    /// A flag without its value.
    #[error("`{flag}` needs a value")]
    ValueMissing {
        /// The flag or option.
        flag: String,
    },
    /// A value of the wrong form.
    #[error("mount option `{option}`: `{value}` is not {expected}")]
    Value {
        /// The option.
        option: String,
        /// What was given.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// An option nobody knows.
    #[error("unknown mount option `{option}`; docs/guide/mount.md lists those there are")]
    Option {
        /// The option.
        option: String,
    },
}

impl MountOptions {
    /// The defaults for cluster `cluster` on `mountpoint`. Others may look inside when root mounts.
    pub fn new(cluster: &str, mountpoint: impl Into<PathBuf>) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            read_only: false,
            fail_on_no_space: false,
            log_file: None,
            allow_other: crate::mount::is_root(),
            threads: std::thread::available_parallelism().map_or(1, |count| count.get()).min(4),
            fsname: format!("cairn://{cluster}"),
            writeback: false,
            lease_wait_seconds: 12,
            dev: false,
            suid: false,
            exec: true,
            sync: false,
        }
    }

    /// Applies a comma-separated list as given to `-o`. `foreground` and what only concerns fstab are accepted here.
    ///
    /// # Errors
    /// [`MountArgsError`] names the first option that is unknown or malformed.
    pub fn apply(&mut self, list: &str) -> Result<(), MountArgsError> {
        for option in list.split(',').filter(|option| !option.is_empty()) {
            self.apply_one(option)?;
        }
        Ok(())
    }

    fn apply_one(&mut self, option: &str) -> Result<(), MountArgsError> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        let needed = || match value {
            Some(value) if !value.is_empty() => Ok(value),
            _ => Err(MountArgsError::ValueMissing { flag: name.to_owned() }),
        };
        match name {
            "log" => self.log_file = Some(PathBuf::from(needed()?)),
            "fsname" => self.fsname = needed()?.to_owned(),
            "threads" => {
                let text = needed()?;
                let count = text.parse().ok().filter(|count| (1..=64).contains(count));
                self.threads = count.ok_or_else(|| MountArgsError::Value {
                    option: name.to_owned(),
                    value: text.to_owned(),
                    expected: "a number from 1 to 64",
                })?;
            }
            "lease-wait" | "lease_wait" => {
                let text = needed()?;
                let seconds = text.parse().ok().filter(|seconds| (1..=3600).contains(seconds));
                self.lease_wait_seconds = seconds.ok_or_else(|| MountArgsError::Value {
                    option: name.to_owned(),
                    value: text.to_owned(),
                    expected: "a number of seconds from 1 to 3600",
                })?;
            }
            // For mount(8), systemd and libfuse, not for us.
            "subtype" | "comment" | "context" | "x" => {}
            _ if name.starts_with("x-") || name.starts_with("X-") => {}
            _ if value.is_some() => return Err(MountArgsError::Option { option: name.to_owned() }),
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "fail-on-nospace" | "fail_on_nospace" => self.fail_on_no_space = true,
            "wait-on-nospace" | "wait_on_nospace" => self.fail_on_no_space = false,
            "allow_other" => self.allow_other = true,
            "noallow_other" => self.allow_other = false,
            "writeback" => self.writeback = true,
            "nowriteback" => self.writeback = false,
            "dev" => self.dev = true,
            "nodev" => self.dev = false,
            "suid" => self.suid = true,
            "nosuid" => self.suid = false,
            "exec" => self.exec = true,
            "noexec" => self.exec = false,
            "sync" => self.sync = true,
            "async" => self.sync = false,
            // Access times are never written, permissions are always checked by the kernel; directories are
            // synchronous.
            "atime"
            | "noatime"
            | "relatime"
            | "norelatime"
            | "strictatime"
            | "nostrictatime"
            | "lazytime"
            | "nolazytime"
            | "diratime"
            | "nodiratime"
            | "dirsync"
            | "default_permissions" => {}
            "defaults" | "auto" | "noauto" | "user" | "nouser" | "users" | "owner" | "group" | "_netdev" | "nofail"
            | "fail" | "silent" | "loud" | "foreground" => {}
            _ => return Err(MountArgsError::Option { option: name.to_owned() }),
        }
        Ok(())
    }
}

/// Name of the cluster in `cairn://NAME`, `cairn#NAME` or the older `vstorage://NAME`.
fn cluster_name(source: &str) -> Result<&str, MountArgsError> {
    let name = source.strip_prefix("cairn#").or_else(|| source.strip_prefix("vstorage#")).unwrap_or(source);
    let name = name.strip_prefix("cairn://").or_else(|| name.strip_prefix("vstorage://")).unwrap_or(name);
    let name = name.trim_end_matches('/');
    if name.is_empty() || name.contains(['/', ':', '#']) {
        return Err(MountArgsError::Source { source_name: source.to_owned() });
    }
    Ok(name)
}

/// Reads what mount(8) gives a helper, after the program's own name: `cairn://NAME DIR [-sfnv] [-N ns] [-o list] [-t
/// type]`. It calls `/sbin/mount.fuse.cairn` so for an fstab line `cairn://NAME DIR fuse.cairn rw,nosuid,nodev 0 0`,
/// and `mount.fuse` calls `cairn` so for a source `cairn#NAME`.
///
/// # Errors
/// [`MountArgsError`] names what is missing, malformed or unknown.
pub fn parse_mount_args(arguments: &[String]) -> Result<MountArgs, MountArgsError> {
    let (mut words, mut lists, mut foreground) = (Vec::new(), Vec::new(), false);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value =
            |flag: &str| rest.next().cloned().ok_or_else(|| MountArgsError::ValueMissing { flag: flag.to_owned() });
        match argument.as_str() {
            "-o" => lists.push(value("-o")?),
            "-t" => drop(value("-t")?),
            "-N" => drop(value("-N")?),
            "--fail-on-nospace" => lists.push("fail-on-nospace".to_owned()),
            "--foreground" => foreground = true,
            flags if flags.starts_with("-o") => lists.push(flags[2..].to_owned()),
            flags if flags.len() > 1 && flags.starts_with('-') && !flags.starts_with("--") => {
                for flag in flags[1..].chars() {
                    match flag {
                        // Sloppy, no mtab, verbose: nothing of it changes what we do.
                        's' | 'n' | 'v' => {}
                        'f' => foreground = true,
                        'r' => lists.push("ro".to_owned()),
                        'w' => lists.push("rw".to_owned()),
                        _ => return Err(MountArgsError::Argument { argument: argument.clone() }),
                    }
                }
            }
            word if !word.starts_with('-') => words.push(word.to_owned()),
            _ => return Err(MountArgsError::Argument { argument: argument.clone() }),
        }
    }
    let mut words = words.into_iter();
    let source = words.next().ok_or(MountArgsError::SourceMissing)?;
    let cluster = cluster_name(&source)?.to_owned();
    let directory = words.next().ok_or(MountArgsError::DirectoryMissing { source_name: source })?;
    if let Some(argument) = words.next() {
        return Err(MountArgsError::Argument { argument });
    }
    let mut options = MountOptions::new(&cluster, directory);
    for list in &lists {
        options.apply(list)?;
        foreground |= list.split(',').any(|option| option == "foreground");
    }
    Ok(MountArgs { cluster, options, foreground })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<MountArgs, MountArgsError> {
        parse_mount_args(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn an_fstab_line_arrives_through_the_helper() {
        let args =
            parse("cairn://stor1 /mnt/stor1 -o rw,nosuid,nodev,_netdev,x-systemd.automount -t fuse.cairn").unwrap();
        assert_eq!(args.cluster, "stor1");
        assert_eq!(args.options.mountpoint, PathBuf::from("/mnt/stor1"));
        assert_eq!(args.options.fsname, "cairn://stor1");
        assert!(!args.options.read_only && !args.options.dev && !args.options.suid && !args.foreground);
        for source in ["cairn#stor1", "vstorage://stor1", "cairn#cairn://stor1/", "stor1"] {
            assert_eq!(parse(&format!("{source} /mnt")).unwrap().cluster, "stor1", "{source}");
        }
    }

    #[test]
    fn options_say_what_they_say() {
        let args = parse("cairn://a /m -r -o fail-on-nospace,log=/var/log/m.log -othreads=3,writeback,dev,suid,noexec")
            .unwrap();
        let options = args.options;
        assert!(options.read_only && options.fail_on_no_space && options.writeback && options.dev && options.suid);
        assert!(!options.exec);
        assert_eq!(options.log_file, Some(PathBuf::from("/var/log/m.log")));
        assert_eq!(options.threads, 3);
        assert!(!parse("cairn://a /m -o ro,rw").unwrap().options.read_only, "the last one counts");
        assert!(parse("cairn://a /m --fail-on-nospace").unwrap().options.fail_on_no_space);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let error = |line: &str| parse(line).unwrap_err().to_string();
        assert!(error("cairn://a /m -o rw,frobnicate").contains("`frobnicate`"));
        assert!(error("cairn://a /m -o ro=1").contains("`ro`"));
        assert!(error("cairn://a /m -o threads=0").contains("`0`"));
        assert!(error("cairn://a /m -o log=").contains("`log`"));
        assert!(error("cairn://a /m -o").contains("`-o`"));
        assert!(error("cairn://a /m extra").contains("`extra`"));
        assert!(error("cairn://a").contains("cairn://a"));
        assert!(error("cairn://a/b /m").contains("cairn://a/b"));
        assert!(error("cairn://a /m --what").contains("`--what`"));
        assert_eq!(parse_mount_args(&[]), Err(MountArgsError::SourceMissing));
    }
}
