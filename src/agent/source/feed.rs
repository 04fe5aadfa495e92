//! Objects of one kind, told one by one from the API server.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::{
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::ListMeta,
};
use kube::{
    Api, Client,
    api::{ApiResource, ListParams, PartialObjectMeta},
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};

use crate::backoff::{Backoff, around};

use super::object::{Key, Object};

/// Objects of a page of a list.
const PAGE: u32 = 500;

/// How long a watch lasts before it is asked for anew. A connection that died silently is noticed 5 s after that.
const WATCH: Duration = Duration::from_secs(120);

/// Waits after a failure.
const AFTER_FAILURE: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));

/// Waits for a kind that is not served: somebody may define it at any time, and often nobody ever does.
const AFTER_ABSENCE: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// For how long the answer whether a definition is being removed holds.
const VANISHING: Duration = Duration::from_millis(500);

/// What is told.
#[derive(Clone, Debug)]
pub enum Notice<T> {
    /// A list begins.
    Start,
    /// An object of the list, or one that was made or changed.
    Seen(Box<Object<T>>),
    /// An object was deleted by somebody, and not because its definition is.
    Gone(Key),
    /// The list is complete.
    Complete,
    /// The kind is not served.
    Absent,
    /// The API server cannot be reached or refuses; it is tried again.
    Failed(String),
}

/// Tells of one kind.
pub struct Feed<T, E> {
    /// Where.
    pub client: Client,
    /// What.
    pub resource: ApiResource,
    /// Which namespace; all where none.
    pub namespace: Option<String>,
    /// Whether names are enough, for kinds with large objects. Only for [`Self::poll`].
    pub names_only: bool,
    /// Whom.
    pub sender: mpsc::Sender<E>,
    /// As what.
    pub wrap: fn(Notice<T>) -> E,
}

/// Nobody listens any more.
struct Deaf;

impl<T, E> Feed<T, E>
where
    T: DeserializeOwned + Clone + Debug + Send + Sync + 'static,
    E: Send + 'static,
{
    fn api(&self) -> Api<Object<T>> {
        match &self.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &self.resource),
            None => Api::all_with(self.client.clone(), &self.resource),
        }
    }

    async fn tell(&self, notice: Notice<T>) -> Result<(), Deaf> {
        self.sender.send((self.wrap)(notice)).await.map_err(|_| Deaf)
    }

    fn failed(&self, err: &impl std::fmt::Display) -> Notice<T> {
        Notice::Failed(format!("{}: {err}", self.name()))
    }

    fn name(&self) -> String {
        format!("{}.{}", self.resource.plural, self.resource.group)
    }

    /// Lists and then watches until nobody listens.
    pub async fn watch(self) {
        let (mut failure, mut absence) = (AFTER_FAILURE, AFTER_ABSENCE);
        while self.watch_once(&mut failure, &mut absence).await.is_ok() {}
    }

    /// Until the kind is not served any more.
    async fn watch_once(&self, failure: &mut Backoff, absence: &mut Backoff) -> Result<(), Deaf> {
        let seconds = u32::try_from(around(WATCH).as_secs()).unwrap_or(u32::MAX);
        let config = watcher::Config::default().page_size(PAGE).timeout(seconds);
        let mut events = pin!(watcher(self.api(), config));
        let mut vanishing: Option<(Instant, bool)> = None;
        while let Some(event) = events.next().await {
            let notice = match event {
                Ok(Event::Init) => Notice::Start,
                Ok(Event::InitApply(object) | Event::Apply(object)) => Notice::Seen(Box::new(object)),
                Ok(Event::InitDone) => {
                    absence.reset();
                    Notice::Complete
                }
                Ok(Event::Delete(object)) => {
                    let known = vanishing.filter(|(asked, _)| asked.elapsed() < VANISHING);
                    let (_, is) = match known {
                        Some(known) => known,
                        None => *vanishing.insert((Instant::now(), self.vanishing().await)),
                    };
                    if is {
                        // The objects go with their definition; nobody removed them one by one.
                        self.tell(Notice::Absent).await?;
                        sleep(absence.wait()).await;
                        return Ok(());
                    }
                    Notice::Gone(object.key())
                }
                Err(err) if not_served(&err) => {
                    self.tell(Notice::Absent).await?;
                    sleep(absence.wait()).await;
                    return Ok(());
                }
                // The server has forgotten what we saw last; the next event begins a new list. No failure.
                Err(watcher::Error::WatchError(status)) if status.code == 410 => continue,
                Err(err) => {
                    self.tell(self.failed(&err)).await?;
                    sleep(failure.wait()).await;
                    continue;
                }
            };
            // A list that begins has not been answered yet.
            if !matches!(notice, Notice::Start) {
                failure.reset();
            }
            self.tell(notice).await?;
        }
        Ok(())
    }

    /// Whether the kind's definition is being removed or gone.
    async fn vanishing(&self) -> bool {
        let definitions: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(self.client.clone());
        match definitions.get(&self.name()).await {
            Ok(definition) => definition.metadata.deletion_timestamp.is_some(),
            Err(kube::Error::Api(status)) if status.code == 404 => {
                // Kinds of an aggregated API server have no definition either.
                let one = self.api().list(&ListParams::default().limit(1)).await;
                matches!(one, Err(kube::Error::Api(status)) if status.code == 404)
            }
            Err(_) => false,
        }
    }

    /// Lists every so often, while it is wanted: for kinds whose objects change all the time, most of it nothing to us.
    pub async fn poll(self, period: Duration, mut wanted: watch::Receiver<bool>) {
        let (mut failure, mut absence) = (AFTER_FAILURE, AFTER_ABSENCE);
        while wanted.wait_for(|wanted| *wanted).await.is_ok() {
            let Ok(wait) = self.poll_once(period, &mut failure, &mut absence).await else { return };
            sleep(wait).await;
        }
    }

    /// One page, and where the next one begins.
    async fn page(&self, params: &ListParams) -> kube::Result<(Vec<Object<T>>, Option<String>)> {
        let token = |metadata: ListMeta| metadata.continue_.filter(|token| !token.is_empty());
        if !self.names_only {
            let page = self.api().list(params).await?;
            return Ok((page.items, token(page.metadata)));
        }
        let page = self.api().list_metadata(params).await?;
        let objects = page.items.into_iter().map(|object| Object { meta: object.metadata, body: Err(String::new()) });
        Ok((objects.collect(), token(page.metadata)))
    }

    async fn poll_once(
        &self,
        period: Duration,
        failure: &mut Backoff,
        absence: &mut Backoff,
    ) -> Result<Duration, Deaf> {
        let mut params = ListParams::default().limit(PAGE);
        self.tell(Notice::Start).await?;
        loop {
            let (objects, next) = match self.page(&params).await {
                Ok(page) => page,
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    self.tell(Notice::Absent).await?;
                    return Ok(absence.wait());
                }
                Err(err) => {
                    self.tell(self.failed(&err)).await?;
                    return Ok(failure.wait());
                }
            };
            for object in objects {
                self.tell(Notice::Seen(Box::new(object))).await?;
            }
            match next {
                Some(token) => params = params.continue_token(&token),
                None => break,
            }
        }
        failure.reset();
        absence.reset();
        self.tell(Notice::Complete).await?;
        Ok(around(period))
    }
}

fn not_served(err: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(kube::Error::Api(status))
    | watcher::Error::WatchStartFailed(kube::Error::Api(status))
    | watcher::Error::WatchFailed(kube::Error::Api(status))) = err
    else {
        return false;
    };
    status.code == 404
}
