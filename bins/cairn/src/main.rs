//! The one executable. Everything is in `cairn-cli`; this turns its exit code into the process's.

fn main() {
    std::process::exit(cairn_cli::main());
}
