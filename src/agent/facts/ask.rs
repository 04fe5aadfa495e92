//! How the API server is asked: objects are followed by a watch, or polled where they say something else all the time.
//! A kind that is not served, or may not be read, is asked for again ever more rarely, up to two minutes: it may come.

use std::{collections::BTreeMap, fmt::Debug, time::Duration};

use futures_util::StreamExt;
use kube::{
    Api,
    api::ListParams,
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, time::sleep};

use crate::{
    backoff::{Backoff, around},
    kube_error::words,
};

use super::{
    decide::{Answer, Origin},
    slim::Slim,
};

/// Where answers go.
pub type Sink = mpsc::Sender<(Origin, Answer)>;

/// Objects asked for at a time.
const PAGE: u32 = 200;

/// First and longest pause after an error.
const TROUBLE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// First and longest pause where a kind is not there.
const ABSENT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(120));

/// What an error says that asking again soon does not mend: the kind is not served, or not for us.
pub fn refused(err: &kube::Error) -> Option<Answer> {
    match err {
        kube::Error::Api(status) if status.code == 404 => Some(Answer::Absent("not served".to_owned())),
        kube::Error::Api(status) if status.code == 403 => {
            Some(Answer::Forbidden(format!("forbidden: {}", status.message)))
        }
        _ => None,
    }
}

/// Objects by name.
pub type Objects<S> = BTreeMap<String, Slim<S>>;

/// From objects to what they say together.
pub type Gather<S> = Box<dyn Fn(&Objects<S>) -> Answer + Send + Sync>;

/// Objects that are followed.
pub struct Following<S> {
    /// Who speaks through them.
    pub origin: Origin,
    /// The same objects in several groups or versions; the first that is served is used.
    pub apis: Vec<Api<Slim<S>>>,
    /// Which of them, as a field selector; all where it is empty.
    pub fields: String,
    /// What they say together.
    pub gather: Gather<S>,
}

impl<S: Clone + Debug + Default + DeserializeOwned + Send + Sync + 'static> Following<S> {
    /// Follows until nobody listens.
    pub async fn run(self, sink: Sink) {
        let (mut absent, mut trouble) = (Backoff::new(ABSENT.0, ABSENT.1), Backoff::new(TROUBLE.0, TROUBLE.1));
        while !sink.is_closed() {
            let (mut refusal, mut failure) = (None, None);
            for api in &self.apis {
                // The watcher would log each refusal.
                match api.list(&ListParams::default().limit(1).fields(&self.fields)).await {
                    Ok(_) => {
                        (absent, trouble) = (Backoff::new(ABSENT.0, ABSENT.1), Backoff::new(TROUBLE.0, TROUBLE.1));
                        refusal = self.watch(api, &sink).await;
                        break;
                    }
                    Err(err) => match refused(&err) {
                        // That one is not served says nothing while another may not be read.
                        Some(answer @ Answer::Forbidden(_)) => refusal = Some(answer),
                        Some(answer) => refusal = refusal.or(Some(answer)),
                        None => failure = Some(words(&err)),
                    },
                }
            }
            let (answer, pause) = match failure {
                Some(why) => (Answer::Waiting(why), trouble.wait()),
                None => (refusal.unwrap_or_else(|| Answer::Absent("gone".to_owned())), absent.wait()),
            };
            if sink.send((self.origin, answer)).await.is_err() {
                return;
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = sink.closed() => return,
            }
        }
    }

    /// Follows one kind until it is refused, and returns why.
    async fn watch(&self, api: &Api<Slim<S>>, sink: &Sink) -> Option<Answer> {
        let config = watcher::Config::default().page_size(PAGE).fields(&self.fields);
        let mut events = std::pin::pin!(watcher(api.clone(), config));
        let (mut objects, mut fresh) = (Objects::new(), Objects::new());
        let mut pause = Backoff::new(TROUBLE.0, TROUBLE.1);
        let mut listed = false;
        while let Some(event) = events.next().await {
            let name = |object: &Slim<S>| kube::Resource::meta(object).name.clone().unwrap_or_default();
            match event {
                Ok(Event::Init) => fresh.clear(),
                Ok(Event::InitApply(object)) => drop(fresh.insert(name(&object), object)),
                Ok(Event::InitDone) => {
                    objects = std::mem::take(&mut fresh);
                    listed = true;
                }
                Ok(Event::Apply(object)) => drop(objects.insert(name(&object), object)),
                Ok(Event::Delete(object)) => drop(objects.remove(&name(&object))),
                Err(err) => {
                    let (refusal, words) = explain(&err);
                    if refusal.is_some() {
                        return refusal;
                    }
                    if sink.send((self.origin, Answer::Waiting(words))).await.is_err() {
                        return None;
                    }
                    sleep(pause.wait()).await;
                    continue;
                }
            }
            pause.reset();
            // Nothing before the whole list is there.
            if listed && sink.send((self.origin, (self.gather)(&objects))).await.is_err() {
                return None;
            }
        }
        None
    }
}

/// Why a watch was refused, if it was, and the error in words.
fn explain(err: &watcher::Error) -> (Option<Answer>, String) {
    match err {
        watcher::Error::InitialListFailed(err)
        | watcher::Error::WatchStartFailed(err)
        | watcher::Error::WatchFailed(err) => (refused(err), words(err)),
        watcher::Error::WatchError(status) => (None, status.message.clone()),
        watcher::Error::NoResourceVersion => (None, err.to_string()),
    }
}

/// Asks now and then until nobody listens: at longest every `every`, sooner while there is no answer.
pub async fn poll<F, A>(origin: Origin, sink: Sink, every: Duration, ask: F)
where
    F: Fn() -> A + Send,
    A: Future<Output = Result<Answer, kube::Error>> + Send,
{
    let mut pause = Backoff::new(TROUBLE.0, every);
    loop {
        let answer = ask().await.unwrap_or_else(|err| refused(&err).unwrap_or_else(|| Answer::Waiting(words(&err))));
        let wait = match &answer {
            Answer::Said(_) => around(every),
            Answer::Absent(_) | Answer::Forbidden(_) => pause.wait(),
            Answer::Waiting(_) => pause.wait().min(TROUBLE.1),
        };
        if sink.send((origin, answer)).await.is_err() {
            return;
        }
        tokio::select! {
            () = sleep(wait) => {}
            () = sink.closed() => return,
        }
    }
}
