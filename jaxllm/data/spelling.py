"""Frequent misspellings of English put right, where that is safe.

A word changes only when it is on the list (none of which is a word, in English or as a name), stands in lower case in prose,
not in code, quotation marks, an address or a longer name, and the document does not prefer it: a text that writes it more often
than the right form, and more than twice, means it, or is about it. Documents that are not English are left alone.
"""

import collections
import re

from jaxllm.data.prose import by_paragraph

PAIRS = """
teh:the recieve:receive recieved:received recieves:receives reciept:receipt seperate:separate seperated:separated
seperately:separately definately:definitely definitly:definitely occured:occurred occuring:occurring
occurence:occurrence occurences:occurrences
untill:until wich:which becuase:because beacuse:because becasue:because beleive:believe beleived:believed acheive:achieve
acheived:achieved adress:address adresses:addresses accomodate:accommodate accross:across agressive:aggressive aparent:apparent
apparantly:apparently arguement:argument arguements:arguments begining:beginning buisness:business
catagory:category cemetary:cemetery commited:committed comittee:committee completly:completely concious:conscious
dependancy:dependency diffrent:different dissapear:disappear dissapoint:disappoint embarass:embarrass enviroment:environment
enviroments:environments existance:existence experiance:experience familar:familiar finaly:finally foriegn:foreign
fourty:forty freind:friend freinds:friends goverment:government grammer:grammar gaurd:guard harrass:harass
immediatly:immediately independant:independent intrest:interest knowlege:knowledge lenght:length libary:library
liason:liaison maintainance:maintenance maintenence:maintenance millenium:millennium mispell:misspell neccessary:necessary
necesary:necessary noticable:noticeable paralel:parallel persistant:persistent peice:piece posession:possession
prefered:preferred publically:publicly realy:really refered:referred refering:referring relevent:relevant religous:religious
rember:remember remeber:remember resistence:resistance responsability:responsibility sentance:sentence sieze:seize
similiar:similar sincerly:sincerely succesful:successful successfull:successful succesfully:successfully supress:suppress
suprise:surprise suprised:surprised temperture:temperature tommorow:tomorrow tommorrow:tomorrow tounge:tongue truely:truly
unfortunatly:unfortunately usefull:useful wierd:weird writting:writing writen:written
"""
RIGHT = dict(pair.split(":") for pair in PAIRS.split())
MAY_BE_WRONG = re.compile(rf"\b(?:{'|'.join(RIGHT)})\b")
WRONG = re.compile(rf"(?<![\w`'\"“‘«/.@#&_-])(?:{'|'.join(RIGHT)})(?![\w`'\"”’»/@_-]|\.\w|\()")
ENGLISH = re.compile(r"\b(?:the|and|of|to|is|in|that|it|for|was|with|a)\b")


def respelled(text: str) -> tuple[str, int]:
    """Returns the text with its safe misspellings put right, and how many."""
    wrong = collections.Counter(MAY_BE_WRONG.findall(text))
    if not wrong or len(ENGLISH.findall(text)) < 0.1 * len(text.split()):
        return text, 0
    meant = {word for word, n in wrong.items() if n > 2 and n > len(re.findall(rf"(?i)\b{RIGHT[word]}\b", text))}
    n = 0

    def put_right(found: re.Match) -> str:
        nonlocal n
        if found[0] in meant:
            return found[0]
        n += 1
        return RIGHT[found[0]]

    return by_paragraph(text, lambda paragraph: WRONG.sub(put_right, paragraph)), n
