//! A client on a thread of its own, reached from any thread.

use crate::config::{ClientConfig, ConnectError};
use crate::shell::LocalClient;
use cairn_env_real::block_on_local;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{JoinHandle, ThreadId};
use tokio::sync::Notify;

/// Jobs that may wait for the thread; further callers wait for room.
const JOBS_MAX: usize = 16_384;

type Job = Box<dyn FnOnce(&LocalClient) + Send>;

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    stop: bool,
}

struct Shared {
    jobs: Mutex<Jobs>,
    room: Condvar,
    wake: Notify,
    thread: Mutex<Option<JoinHandle<()>>>,
    thread_id: Mutex<Option<ThreadId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A job that panicked has ended its thread; what the mutex guards is still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client that any thread may use. Clones are handles to the same one.
#[derive(Clone)]
pub struct Client(Arc<Shared>);

impl Client {
    /// Starts the thread and connects.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn spawn(config: ClientConfig) -> Result<Client, ConnectError> {
        let shared = Arc::new(Shared {
            jobs: Mutex::default(),
            room: Condvar::new(),
            wake: Notify::new(),
            thread: Mutex::new(None),
            thread_id: Mutex::new(None),
        });
        let (told, connected) = mpsc::channel();
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("cairn-client".to_owned()).spawn(move || {
            *lock(&theirs.thread_id) = Some(std::thread::current().id());
            let ran = block_on_local(serve(config, Arc::clone(&theirs), told.clone()));
            if let Err(error) = ran {
                let _ = told.send(Err(ConnectError::Io(error)));
            }
            // Whoever waits for room now waits for nothing.
            lock(&theirs.jobs).stop = true;
            theirs.room.notify_all();
        })?;
        let outcome = connected
            .recv()
            .unwrap_or_else(|_| Err(ConnectError::Io(std::io::Error::other("the client's thread ended early"))));
        match outcome {
            Ok(()) => {
                *lock(&shared.thread) = Some(thread);
                Ok(Client(shared))
            }
            Err(error) => {
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// Runs `f` on the client's thread, in order of the calls. Waits while too many jobs are waiting, except on that
    /// thread itself. After [`Client::shutdown`] the job is dropped.
    pub fn run(&self, f: impl FnOnce(&LocalClient) + Send + 'static) {
        let inside = *lock(&self.0.thread_id) == Some(std::thread::current().id());
        let mut jobs = lock(&self.0.jobs);
        while jobs.waiting.len() >= JOBS_MAX && !jobs.stop && !inside {
            jobs = self.0.room.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
        if jobs.stop {
            return;
        }
        let first = jobs.waiting.is_empty();
        jobs.waiting.push_back(Box::new(f));
        drop(jobs);
        if first {
            self.0.wake.notify_one();
        }
    }

    /// Runs what waits, closes the client and ends its thread.
    pub fn shutdown(self) {
        lock(&self.0.jobs).stop = true;
        self.0.wake.notify_one();
        let thread = lock(&self.0.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

async fn serve(config: ClientConfig, shared: Arc<Shared>, told: mpsc::Sender<Result<(), ConnectError>>) {
    let client = match LocalClient::connect(config).await {
        Ok(client) => client,
        Err(error) => {
            let _ = told.send(Err(error));
            return;
        }
    };
    let _ = told.send(Ok(()));
    loop {
        let (jobs, stop) = {
            let mut jobs = lock(&shared.jobs);
            (std::mem::take(&mut jobs.waiting), jobs.stop)
        };
        shared.room.notify_all();
        let idle = jobs.is_empty();
        jobs.into_iter().for_each(|job| job(&client));
        if idle && stop {
            break;
        }
        if idle {
            shared.wake.notified().await;
        } else if !lock(&shared.jobs).waiting.is_empty() {
            // Sockets get their turn between two batches.
            tokio::task::yield_now().await;
        }
    }
    client.close().await;
}
