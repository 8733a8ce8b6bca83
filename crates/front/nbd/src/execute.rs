//! From requests to operations on the device.

use crate::connection::Connection;
use crate::exports::ExportOptions;
use cairn_env::Buf;
use cairn_env::block::{BlockDevice, BlockError, BlockOp, BlockReply, BlockResult};
use cairn_nbd_proto::{Command, Errno, Request, Ticket};
use cairn_stdx::planted;
use std::cell::RefCell;
use std::rc::Rc;

/// Zeros that must occupy space are written in pieces of this size.
const ZERO_PIECE_SIZE: u64 = 1 << 20;
/// So many such pieces are under way at once.
const ZERO_PIECES_IN_FLIGHT_MAX: usize = 4;

/// Starts `request` on `device`; `connection` gets its outcome, perhaps before this returns.
pub(crate) fn execute(
    connection: &Rc<Connection>,
    device: &Rc<dyn BlockDevice>,
    options: &ExportOptions,
    request: Request,
) {
    let Request { ticket, command } = request;
    let op = match command {
        Command::Read { offset, len } => BlockOp::Read { offset, len },
        Command::Write { offset, data, fua } => BlockOp::Write { offset, data, fua },
        Command::Flush if planted!("nbd_flush_not_forwarded") => {
            return connection.complete(ticket, Ok(BlockReply::Done));
        }
        Command::Flush => BlockOp::Flush,
        Command::Trim { offset, len, fua: true } if !planted!("nbd_trim_fua_without_flush") => {
            let op = BlockOp::Discard { offset, len };
            return submit_then_flush(connection, device, ticket, op);
        }
        Command::Trim { offset, len, .. } => BlockOp::Discard { offset, len },
        Command::WriteZeroes { fast: true, no_hole: true, .. } if options.provision_zeroes => {
            return connection.refuse(ticket, Errno::NotSupported, "zeros that take space are as slow as data");
        }
        Command::WriteZeroes { offset, len, fua, no_hole: true, .. } if options.provision_zeroes => {
            return Provision::start(connection, device, ticket, offset, len, fua);
        }
        Command::WriteZeroes { offset, len, fua, .. } => BlockOp::WriteZeroes { offset, len, fua },
        Command::BlockStatus { offset, len } => BlockOp::Extents { offset, len },
    };
    if planted!("nbd_ack_before_done") && matches!(op, BlockOp::Write { .. }) {
        device.submit(op, Box::new(|_| {}));
        return connection.complete(ticket, Ok(BlockReply::Done));
    }
    submit(connection, device, ticket, op);
}

fn submit(connection: &Rc<Connection>, device: &Rc<dyn BlockDevice>, ticket: Ticket, op: BlockOp) {
    let connection = Rc::clone(connection);
    device.submit(op, Box::new(move |result| connection.complete(ticket, result)));
}

/// For an operation that has no forced unit access of its own: a flush behind it has the same effect.
fn submit_then_flush(connection: &Rc<Connection>, device: &Rc<dyn BlockDevice>, ticket: Ticket, op: BlockOp) {
    let (connection, behind) = (Rc::clone(connection), Rc::clone(device));
    let done = move |result: BlockResult| match result {
        Ok(_) => submit(&connection, &behind, ticket, BlockOp::Flush),
        Err(error) => connection.complete(ticket, Err(error)),
    };
    device.submit(op, Box::new(done));
}

/// Writes zeros that occupy space, piece by piece, as the device takes them.
struct Provision {
    connection: Rc<Connection>,
    device: Rc<dyn BlockDevice>,
    zeroes: Buf,
    progress: RefCell<Progress>,
}

struct Progress {
    next: u64,
    end: u64,
    fua: bool,
    in_flight: usize,
    /// A call of `advance` is on the stack: it will see what completions inside it change.
    advancing: bool,
    error: Option<BlockError>,
    ticket: Option<Ticket>,
}

impl Provision {
    fn start(
        connection: &Rc<Connection>,
        device: &Rc<dyn BlockDevice>,
        ticket: Ticket,
        offset: u64,
        len: u64,
        fua: bool,
    ) {
        let progress = Progress {
            next: offset,
            end: offset + len,
            fua,
            in_flight: 0,
            advancing: false,
            error: None,
            ticket: Some(ticket),
        };
        let provision = Rc::new(Self {
            connection: Rc::clone(connection),
            device: Rc::clone(device),
            zeroes: Buf::zeroed(ZERO_PIECE_SIZE.min(len) as usize),
            progress: RefCell::new(progress),
        });
        provision.advance();
    }

    /// Submits pieces while there is room, and finishes when all are done.
    fn advance(self: &Rc<Self>) {
        if std::mem::replace(&mut self.progress.borrow_mut().advancing, true) {
            return;
        }
        while let Some((offset, len)) = self.next_piece() {
            let data = self.zeroes.slice(0, len as usize);
            let provision = Rc::clone(self);
            let done = move |result| provision.piece_done(result);
            self.device.submit(BlockOp::Write { offset, data, fua: false }, Box::new(done));
        }
        self.progress.borrow_mut().advancing = false;
        self.finish_if_done();
    }

    fn next_piece(&self) -> Option<(u64, u64)> {
        let mut progress = self.progress.borrow_mut();
        if self.connection.has_ended() {
            progress.error = Some(BlockError::Closed); // Nobody waits for the rest.
        }
        let full = progress.in_flight == ZERO_PIECES_IN_FLIGHT_MAX;
        if progress.error.is_some() || full || progress.next == progress.end {
            return None;
        }
        let offset = progress.next;
        // Pieces end at multiples of their size, so that all but the first start there.
        let boundary = (offset / ZERO_PIECE_SIZE + 1).saturating_mul(ZERO_PIECE_SIZE);
        let len = boundary.min(progress.end).min(offset + self.zeroes.len() as u64) - offset;
        progress.next += len;
        progress.in_flight += 1;
        Some((offset, len))
    }

    fn piece_done(self: &Rc<Self>, result: BlockResult) {
        {
            let mut progress = self.progress.borrow_mut();
            progress.in_flight -= 1;
            if let Err(error) = result {
                progress.error.get_or_insert(error);
            }
        }
        self.advance();
    }

    fn finish_if_done(&self) {
        let mut progress = self.progress.borrow_mut();
        if progress.in_flight > 0 {
            return;
        }
        let Some(ticket) = progress.ticket.take() else { return };
        let (error, fua) = (progress.error.take(), progress.fua);
        drop(progress);
        match error {
            Some(error) => self.connection.complete(ticket, Err(error)),
            None if fua => submit(&self.connection, &self.device, ticket, BlockOp::Flush),
            None => self.connection.complete(ticket, Ok(BlockReply::Done)),
        }
    }
}
