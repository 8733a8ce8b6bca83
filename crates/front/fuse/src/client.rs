//! The real client as a [`Backend`].

use crate::backend::{Backend, CallDone, CloseDone, Job, OpenDone, OpenFailure, Runner, Volume};
use cairn_client::{Client, LocalClient, LocalVolume, OpenError, SizeRule};
use cairn_env::block::{BlockDevice, BlockDone, BlockOp};
use cairn_types::VolumeId;
use cairn_wire::mds::{LeaseGrant, LeaseMode, MdsRequest};
use std::rc::Rc;

/// The client's thread, as the mount reaches it.
pub struct ClientRunner(pub Client);

impl Runner for ClientRunner {
    fn start(&self, job: Box<dyn FnOnce(Rc<dyn Backend>) + Send>) {
        self.0.run(move |local| job(Rc::new(ClientBackend(local.clone()))));
    }

    fn run(&self, job: Job) {
        self.0.run(move |_| job());
    }

    fn shutdown(&self) {
        self.0.clone().shutdown();
    }
}

struct ClientBackend(LocalClient);

impl Backend for ClientBackend {
    fn call(&self, request: MdsRequest, done: CallDone) {
        self.0.call_with(request, done);
    }

    fn open(&self, volume: VolumeId, mode: LeaseMode, done: OpenDone) {
        self.0.open_with(volume, mode, SizeRule::File, move |result| {
            done(match result {
                Ok(volume) => Ok(Rc::new(ClientVolume(volume))),
                Err(error @ (OpenError::Held { .. } | OpenError::InUse(_))) => {
                    Err(OpenFailure::Held(error.to_string()))
                }
                Err(OpenError::Mds(error)) => Err(OpenFailure::Mds(error)),
                Err(error) => Err(OpenFailure::Other(error.to_string())),
            });
        });
    }

    fn adopt(&self, grant: LeaseGrant) -> Rc<dyn Volume> {
        Rc::new(ClientVolume(self.0.adopt(grant, SizeRule::File)))
    }
}

struct ClientVolume(LocalVolume);

impl Volume for ClientVolume {
    fn size(&self) -> u64 {
        BlockDevice::size(&self.0)
    }

    fn set_size(&self, size: u64) {
        self.0.set_size(size);
    }

    fn mode(&self) -> LeaseMode {
        if BlockDevice::read_only(&self.0) { LeaseMode::Shared } else { LeaseMode::Exclusive }
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        BlockDevice::submit(&self.0, op, done);
    }

    fn on_recall(&self, notify: Box<dyn FnMut(LeaseMode)>) {
        self.0.on_recall(notify);
    }

    fn on_lost(&self, notify: Box<dyn FnOnce()>) {
        self.0.on_lost(notify);
    }

    fn close(&self, done: CloseDone) {
        self.0.clone().close_with(move || done(Ok(())));
    }

    fn release(&self, done: CloseDone) {
        self.0.clone().release_with(move || done(Ok(())));
    }
}
